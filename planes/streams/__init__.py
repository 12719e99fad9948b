"""Streams: one TCP connection per (gateway process, worker), many requests on it.

A frame is a 4-byte little-endian length and that many bytes of msgpack (`wire/frames.py`). A worker writes one Step
per engine step and gateway, so the cost of a frame is shared by all requests of the step. Both sides send a Ping when
they have heard nothing for a while, and give the other up when several in a row stay unanswered.

    gateway (client.py)                        worker (server.py)
    WorkerConnection.open  ── connect ──────►  StreamServer
                           ◄───────── Hello ──  after what `greeting.py` asks for
    start                  ── Generate ─────►  handler.generate
    sink.on_delta …        ◄────────── Step ──  connection.post(Delta)
    sink.on_done           ◄────────── Step ──  connection.post(Done)
    cancel                 ── Cancel ───────►  handler.cancel
    release                ── Release ──────►  handler.release
    sink.on_lost             connection ends    handler.gone

`protocol.py` is what needs no socket, `peer.py` the asyncio that both ends share. Everything here is called on the
event loop and calls back on it; nothing but `open`, `listen` and `stop` waits.
"""
