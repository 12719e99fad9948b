"""A fleet under a virtual clock: the gateway's own `Router`, `Dispatcher` and `Exchange`, the engine's own `SimCore`.

    session starts → Submit → StartLeg → [hop] → prefill steps → [hop] → first token, StartLeg → [hop]
      → blocks admitted → [sender's NIC, one transfer at a time, then the link's fixed time] → decode steps → [hop]
      → Finish, Release → think time → next turn

What decides is the live system's code. What is here moves: `gateway.py` performs the effects of exchanges on virtual
time, `worker.py` computes legs, `simulation.py` starts sessions and kills workers. The model adds a hop each way
between gateway and worker, KV events and load reports that arrive late, one transfer at a time per sending worker (a
NIC is shared fairly in truth; the last byte of a batch of transfers arrives at the same instant either way), and faults
(`scenario.Faults`). Everything is a function of the scenario and the workload: equal seeds give equal results.
"""
