"""Other people's clients, unchanged, against a fleet with the simulated engine: each calls tools and goes on.

python -m tests.clients.run             # all of them; `make test-clients` installs them first
python -m tests.clients.run langchain   # those whose names have this in them

A script in `python/` or `node/` is one client. Its arguments are the gateway's address, the API it is to speak, whether
it streams, what the tool `weather` answers, and what the user asks, one question after the other; HEADRACE_HEADERS has
headers that go with each of its requests and tell the engine what to say. It ends by printing what came of it as JSON:
`calls`, the tool's arguments; `texts`, what the model said in each of its turns, put together from the pieces where it
streams; `usage`, the prompt's and the answer's tokens of each turn.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.stack import stack
from tests.outsiders import Unended, output_of

HERE: Final = Path(__file__).parent
ENVIRONMENTS: Final = HERE.parents[1] / ".venv-clients"
PATIENCE_S: Final = 120.0

PLACES: Final = ("Zürich", "the sea")
CALLS: Final = [{"at": place} for place in PLACES]
WORDY: Final = ", and the wind comes from the west" * 8
"""So long that a prompt in which it is missing is shorter than one that has it, whatever a template adds."""
RESULT: Final = f"20 °C{WORDY}"
TEXTS: Final = [f"I look at both{WORDY}.", f"It is warm{WORDY}.", "Until then …"]
MARKUP: Final = "".join(
    f"\n<tool_call>\n{json.dumps({'name': 'weather', 'arguments': call}, ensure_ascii=False)}\n</tool_call>"
    for call in CALLS
)
SCRIPT: Final = [TEXTS[0] + MARKUP, *TEXTS[1:]]
"""Token for token what the engine says; it takes one for each byte."""
QUESTIONS: Final = ("Is it warm in Zürich and at the sea?", f"Then I go to the sea{WORDY}.")
HEADERS: Final = {"x-headrace-script": json.dumps(SCRIPT), "x-headrace-handover": "always"}
HOW: Final = ("whole", "streamed")


@dataclass(frozen=True, slots=True)
class Client:
    """environment: a folder of ENVIRONMENTS, or "node".  package: the distribution whose version is shown."""

    name: str
    script: str
    environment: str
    package: str
    apis: tuple[str, ...]

    def command(self) -> list[str]:
        if self.environment == "node":
            return ["node", str(HERE / "node" / self.script)]
        # -P: a script may have the name of what it imports.
        return [str(ENVIRONMENTS / self.environment / "bin" / "python"), "-P", str(HERE / "python" / self.script)]

    def version(self) -> str:
        """Of what is installed.  Raises:  OSError, StopIteration if it is not."""
        if self.environment == "node":
            return json.loads((HERE / "node" / "node_modules" / self.package / "package.json").read_text())["version"]
        path = [str(folder) for folder in (ENVIRONMENTS / self.environment / "lib").glob("*/site-packages")]
        return next(iter(importlib.metadata.distributions(name=self.package, path=path))).version


CLIENTS: Final = (
    Client("openai-agents", "openai_agents.py", "python", "openai-agents", ("chat", "responses", "responses by id")),
    Client("langchain-openai", "langchain.py", "python", "langchain-openai", ("chat", "responses", "responses by id")),
    Client("langchain-anthropic", "langchain.py", "python", "langchain-anthropic", ("messages",)),
    Client("llama-index", "llamaindex.py", "llama-index", "llama-index-llms-openai-like", ("chat", "responses")),
    Client("litellm", "litellm_sdk.py", "python", "litellm", ("chat", "responses", "messages")),
    Client("pydantic-ai", "pydantic_ai.py", "python", "pydantic-ai-slim", ("chat", "responses", "messages")),
    Client("openai (Node)", "openai.mjs", "node", "openai", ("chat", "responses", "responses by id")),
    Client("@anthropic-ai/sdk (Node)", "anthropic.mjs", "node", "@anthropic-ai/sdk", ("messages",)),
)


def complaint(got: dict[str, Any]) -> str | None:
    """What is wrong with what a script printed; None: nothing."""
    for name, expected in (("calls", CALLS), ("texts", TEXTS)):
        if got[name] != expected:
            return f"{name} are {got[name]}, not {expected}"
    prompts, answers = zip(*got["usage"], strict=True)
    tokens = [len(text.encode()) + 1 for text in SCRIPT]
    if list(answers) != tokens:
        return f"the answers' tokens are {list(answers)}, not {tokens}"
    for turn, pieces in enumerate(([SCRIPT[0], RESULT, RESULT], [TEXTS[1], QUESTIONS[1]])):
        least = sum(len(piece.encode()) for piece in pieces)
        if prompts[turn + 1] - prompts[turn] < least:
            return f"the prompts' tokens are {prompts}: the history of turn {turn + 2} is lost"
    return None


async def talk(client: Client, url: str, api: str, how: str) -> str | None:
    """What is wrong with how it went, or with what the script printed; None: nothing."""
    try:
        said = await output_of(
            *(*client.command(), url, api, how, RESULT, *QUESTIONS),
            patience_s=PATIENCE_S,
            environment=os.environ | {"HEADRACE_HEADERS": json.dumps(HEADERS)},
        )
    except Unended as exc:
        return str(exc)
    return complaint(json.loads(said.splitlines()[-1]))


def show(line: str) -> None:
    """At once, also into a pipe."""
    print(line, flush=True)


async def run(clients: list[Client]) -> list[tuple[Client, str, dict[str, str | None]]]:
    """Row by row: the client, the API, and for each of HOW what is wrong with it."""
    show("starting etcd, NATS, a prefill and a decode worker with the simulated engine, and a gateway …")
    # Most of a script's time goes into its imports.
    slots = asyncio.Semaphore(os.cpu_count() or 1)
    async with stack("--engine", "sim", "--prefill", "1", "--decode", "1") as one, asyncio.TaskGroup() as tasks:
        url = f"http://127.0.0.1:{one.port}"
        rows = [
            (client, api, {how: tasks.create_task(told(slots, client, url, api, how)) for how in HOW})
            for client in clients
            for api in client.apis
        ]
    return [(client, api, {how: task.result() for how, task in found.items()}) for client, api, found in rows]


async def told(slots: asyncio.Semaphore, client: Client, url: str, api: str, how: str) -> str | None:
    """What is wrong with one conversation."""
    async with slots:
        began = time.monotonic()
        wrong = await talk(client, url, api, how)
        took = f"well, {time.monotonic() - began:.1f} s"
        show(f"  {client.name}, {api}, {how}: {took if wrong is None else f'FAILED: {wrong}'}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="only the clients whose names have this in them")
    name = parser.parse_args().name
    clients = [client for client in CLIENTS if name in client.name]
    if not clients:
        parser.error(f"no client's name has {name!r} in it; there are {', '.join(client.name for client in CLIENTS)}")
    try:
        versions = {client: client.version() for client in clients}
    except (OSError, StopIteration):
        parser.error("not all of them are installed; `make test-clients` does that")
    rows = asyncio.run(run(clients))
    layout = "{:26}{:10}{:17}{:8}{}"
    show("\n" + layout.format("client", "version", "API", *HOW))
    for client, api, found in rows:
        cells = ("FAILED" if found[how] else "well" for how in HOW)
        show(layout.format(client.name, versions[client], api, *cells))
    return int(any(wrong for _, _, found in rows for wrong in found.values()))


if __name__ == "__main__":
    sys.exit(main())
