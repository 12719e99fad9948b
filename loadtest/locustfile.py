"""Streamed chats under locust; first tokens, gaps and answers within SLOs in its statistics, web page and CSV.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -t 60s
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --workload agentic --csv build/agentic

The first has users in a closed loop. With `--workload` the load is open: sessions begin when the workload says,
whatever became of those before, each turn follows the answer to the last one after its think time, and prompts begin
alike as far as they share blocks. It is a trace in Mooncake's format, by path or name, or a load of
`loadtest.workloads`: shared_prefix, agentic, documents, tools, bursts, code, flood, uniform, prefix_repetition. The run
ends when all its sessions have.

Entries: `chat: whole answer`; `chat: first token` and `chat: gap between tokens` (of type SSE); `chat: within SLOs` and
`chat: beyond SLOs`, whose shares are the goodput, and whose times are those of first tokens. `--help` lists options;
each is `HEADRACE_LOAD_...` in the environment, too, and a field of the web page.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import HttpUser, between, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.clients import ResponseContextManager
from locust.env import Environment
from locust.stats import CSV_STATS_INTERVAL_SEC

sys.path.insert(0, str(Path(__file__).parents[1]))  # locust puts this folder there, not the one above

from loadtest.prompts import VOCABULARY, text_of
from loadtest.slo import Slo, mean_gap_s
from loadtest.workloads import Session, load

BLOCK_SIZE = 64  # words that prompts of a workload share or do not share


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: LocustArgumentParser) -> None:
    for flag, default, told in (
        ("model", "", "Name of the model; by default the first that the gateway lists"),
        ("key", "", "API key"),
        ("words", 60, "Words of a user's prompt"),
        ("tokens", 80, "Tokens of a user's answer"),
        ("shared", 0.5, "Share of the prompt that all users have in common"),
        ("workload", "", "Open loop: a trace or a synthetic load, in place of users"),
        ("rate-scale", 1.0, "How many times as fast a workload's sessions begin"),
        ("sessions", 0, "How many sessions of a workload; 0: all"),
        ("longest", 8000, "Leave out turns of a workload with more prompt tokens"),
        ("seed", 0, "Of a synthetic workload"),
        ("slo-ttft-s", 2.0, "For goodput: seconds until the first token"),
        ("slo-itl-ms", 50.0, "For goodput: milliseconds between tokens on average"),
    ):
        name = f"HEADRACE_LOAD_{flag.replace('-', '_').upper()}"
        parser.add_argument(
            f"--{flag}",
            type=type(default),
            default=default,
            env_var=name,
            help=f"{told}. [{default}]",
            is_secret=flag == "key",
        )


@events.init.add_listener  # type: ignore[untyped-decorator]
def _choose(environment: Environment, **_: Any) -> None:
    """Users of one kind: those who chat, or the one who sends a workload."""
    options = environment.parsed_options
    is_open = options is not None and bool(options.workload)
    environment.user_classes = [WorkloadUser] if is_open else [ChatUser]
    if options is not None and options.csv_prefix:
        environment.events.quit.add_listener(_write_last)  # type: ignore[no-untyped-call]


def _write_last(**_: Any) -> None:
    """At the end locust closes its CSV without writing what came since it last did: let it write once more."""
    gevent.sleep(2 * CSV_STATS_INTERVAL_SEC)


class _Asking(HttpUser):
    abstract = True

    def on_start(self) -> None:
        """Learn the model's name."""
        self.options: Any = self.environment.parsed_options
        self.slo = Slo(self.options.slo_ttft_s, self.options.slo_itl_ms / 1000)
        if self.options.key:
            self.client.headers["authorization"] = f"Bearer {self.options.key}"
        self.model = self.options.model or self.client.get("/v1/models").json()["data"][0]["id"]

    def ask(self, prompt: str, max_tokens: int) -> None:
        """One streamed chat. Failures carry the server's own message."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_at = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="chat: whole answer"
        ) as response:
            if response.status_code != 200:
                response.failure(response.text[:500] or f"status {response.status_code}")
                return
            error = self._read(response, sent_at)
            response.request_meta["response_time"] = (time.perf_counter() - sent_at) * 1000  # locust's ends at the head
            response.failure(error) if error else response.success()

    def _read(self, response: ResponseContextManager, sent_at: float) -> str:
        """Read all events; report the first token, each gap and whether SLOs were held. Returns an error or nothing."""
        ttft_s, last_at, usage = 0.0, None, None
        gaps_s: list[float] = []
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return str(event["error"])
            usage = event.get("usage") or usage
            if not any(choice["delta"].get("content") for choice in event["choices"]):
                continue
            now = time.perf_counter()
            if last_at is None:
                ttft_s = now - sent_at
                self._report("chat: first token", ttft_s)
            else:
                gaps_s.append(now - last_at)
                self._report("chat: gap between tokens", gaps_s[-1])
            last_at = now
        if usage is None:
            return "the stream ended without usage"
        if last_at is None:
            return "the answer has no text"
        is_held = self.slo.is_held(ttft_s, mean_gap_s(gaps_s))
        self._report(f"chat: {'within' if is_held else 'beyond'} SLOs", ttft_s)
        return ""

    def _report(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=seconds * 1000, response_length=0, exception=None, context={}
        )


class ChatUser(_Asking):
    """Somebody who chats: one streamed answer after the other."""

    wait_time = between(0.1, 1.0)

    @task
    def chat(self) -> None:
        """Ask with a part of the prompt that is the same for everybody, and one that is new."""
        num_shared = int(self.options.words * self.options.shared)
        words = random.Random(0).choices(VOCABULARY, k=num_shared)
        words += random.choices(VOCABULARY, k=self.options.words - num_shared)
        self.ask(" ".join(words), self.options.tokens)


class WorkloadUser(_Asking):
    """One for a whole workload: begins each session at its instant."""

    fixed_count = 1
    wait_time = constant(0)

    @task
    def send(self) -> None:
        """Send all, wait for the last answer, end the run."""
        options = self.options
        workload = load(options.workload, block_size=BLOCK_SIZE, seed=options.seed).scaled(options.rate_scale)
        workload = workload.limited(options.sessions) if options.sessions else workload
        begun, sessions = time.monotonic(), []
        for number, session in enumerate(workload.sessions):
            gevent.sleep(max(0.0, begun + session.start_s - time.monotonic()))
            sessions.append(gevent.spawn(self._converse, session, number))
        gevent.joinall(sessions)
        if self.environment.runner is not None:
            self.environment.runner.quit()

    def _converse(self, session: Session, number: int) -> None:
        for turn in session.turns:
            gevent.sleep(turn.think_s)
            if turn.prompt_tokens <= self.options.longest:
                self.ask(text_of(turn, BLOCK_SIZE, number), turn.completion_tokens)
