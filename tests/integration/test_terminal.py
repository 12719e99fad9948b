"""`headrace trace`, `top` and `chat` as a person runs them, against a real gateway."""

import asyncio
import sys

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


async def headrace(stack, command, *arguments, typed=""):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "app.cli", command, *arguments, "--url", stack.pairing.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, errors = await process.communicate(typed.encode())
    return process.returncode, told.decode(), errors.decode()


async def test_a_conversation_tells_who_served_and_its_id_is_traced(stack):
    asked = "What turns the wheel of a mill?"  # the same each time: an answer of the simulated engine may end early
    status, told, errors = await headrace(stack, "chat", "--max-tokens", "8", typed=f"{asked}\nand more\n")
    assert (status, errors) == (0, "")
    served = [line for line in told.splitlines() if line.startswith("  [prefill-1 → decode-")]
    assert len(served) == 2
    assert "8 generated" in served[1]
    request = served[1].rstrip("]").rsplit(", ", 1)[1]
    status, told, errors = await headrace(stack, "trace", request)
    assert (status, errors) == (0, "")
    for words in (f"{request} sim: ok after", "prefill-1 → decode-", "handover", "8 tokens", "round_robin weighed"):
        assert words in told
    status, told, errors = await headrace(stack, "trace")
    assert request in told


async def test_a_request_that_nobody_knows_is_told_with_exit_status_2(stack):
    status, _, errors = await headrace(stack, "trace", "never-was")
    assert status == 2
    assert "No decision is kept for request 'never-was'" in errors


async def test_the_fleet_is_seen_at_a_glance(stack):
    status, told, errors = await headrace(stack, "top", "--every-s", "0.2")
    assert (status, errors) == (0, "")
    for words in ("requests/s", "prefill-1", "decode-2", "ready"):
        assert words in told


async def test_a_sound_fleet_is_found_sound(stack):
    planes = ("--etcd", stack.site.etcd, "--nats", stack.site.nats, "--namespace", stack.site.namespace)
    status, told, errors = await headrace(stack, "doctor", *planes)
    assert (status, errors) == (0, ""), told
    for words in ("etcd version: ", "JetStream: ", "worker prefill-1: prefill, ready", "connected to 3 of 3 workers"):
        assert words in told
    assert "the gateway knows every worker's blocks" in told


async def test_a_namespace_without_workers_is_wrong_and_so_is_a_nats_that_is_away(stack):
    planes = ("--etcd", stack.site.etcd, "--nats", "nats://127.0.0.1:9", "--namespace", "nobody")
    status, told, _ = await headrace(stack, "doctor", *planes)
    assert status == 1
    assert "wrong NATS" in told
    assert "wrong workers: none is registered" in told
