"""The console in Debian's chromium: against a simulated fleet under load, 200 made-up workers, and a gateway with keys.

python -m tests.console.run          # `make console-test` installs the browser's driver first
python -m tests.console.run --keep   # leaves its pictures in build/console
"""

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import httpx

from loadtest.processes import free_port
from loadtest.stack import stack

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
KEY: Final = "sk-console-admin"
NUM_CLIENTS: Final = 6
PATIENCE_S: Final = 120.0


async def load(url: str) -> None:
    """Chats for as long as it runs, some of them with a common beginning, half of them handed over for sure."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client, asyncio.TaskGroup() as clients:
        for number in range(NUM_CLIENTS):
            clients.create_task(_chat_on(client, url, random.Random(number)))


async def _chat_on(client: httpx.AsyncClient, url: str, rng: random.Random) -> None:
    while True:
        prompt = rng.choice(("A story that is shared. " * 40, "")) + f"{rng.random()} " * rng.randrange(2, 100)
        body = {"model": "sim", "messages": [{"role": "user", "content": prompt}], "max_tokens": rng.randrange(5, 60)}
        headers = {"x-headrace-handover": rng.choice(("always", "auto"))}
        reply = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        reply.raise_for_status()
        await asyncio.sleep(rng.random())


@asynccontextmanager
async def made_up(*flags: str) -> AsyncIterator[tuple[str, int]]:
    """A gateway whose workers are made up.  Returns: its address and its process."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.console.fake_gateway", "--port", str(port), *flags),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient() as client:
            while not await _answers(client, url):
                if process.returncode is not None:
                    raise RuntimeError(f"the made-up gateway ended with {process.returncode}")
                await asyncio.sleep(0.1)
        yield url, process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/live")).status_code == 200
    except httpx.TransportError:
        return False


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the pictures in build/console")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="headrace-console-") as folder:
        status = await _run(folder)
        if keep:
            shutil.copytree(folder, ROOT / "build" / "console", dirs_exist_ok=True)
    return status


async def _run(folder: str) -> int:
    slos = {"HEADRACE_SLO_TTFT_S": "2", "HEADRACE_SLO_ITL_MS": "50", "HEADRACE_REFUSE_LATE": "false"}
    async with AsyncExitStack() as running:
        flags = ("--engine", "sim", "--prefill", "2", "--decode", "2")
        fleet = await running.enter_async_context(stack(*flags, environment=slos))
        url = f"http://127.0.0.1:{fleet.port}"
        many, pid = await running.enter_async_context(made_up("--workers", "200"))
        keys, _ = await running.enter_async_context(made_up("--workers", "8", "--admin-key", KEY, "--no-playground"))
        asking = asyncio.create_task(load(url))
        driver = await asyncio.create_subprocess_exec(
            *("node", str(HERE / "node" / "browser.mjs"), folder),
            *(f"fleet={url}", f"many={many}", f"keys={keys}"),
            env=os.environ | {"HEADRACE_KEY": KEY, "HEADRACE_MANY_PID": str(pid)},
        )
        status = await driver.wait()
        asking.cancel()
        await asyncio.wait([asking])
        if not asking.cancelled():
            asking.result()
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
