"""The commands that README.md and docs/install.md show, as they stand there.

Each test has a network namespace of its own, in which every default port is free. Where none can be made they take
turns on this machine's ports.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.integration.conftest import PATIENCE_S, ROOT
from workers.settings import SIM_MODEL

ELSEWHERE = {
    "make run ": "what is there afterwards is tested here; `make` itself when this suite is run",
    "app/      the gateway": "a table, no commands",
    "headrace worker --role decode --model org/name -- --quantization fp8": "needs GPUs; tests/unit/workers/vllm",
    "flavor=sim": "needs Docker; tests/docker/test_readme.py",
}
"""Blocks that do not run here, by how they begin, and why."""
HERE = {
    "curl -N http://127.0.0.1:8000/v1/chat/completions": "asking",
    ". .venv/bin/activate": "pieces",
    "headrace worker --task embed": "embedding",
    "curl http://127.0.0.1:8000/v1/load_lora_adapter": "adapters",
    "headrace keys create search": "keys",
    "headrace fleet           #": "terminal",
}
_BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOOPBACK_UP = (
    "import fcntl, socket, struct; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 0x1 | 0x40))"  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
)


def blocks() -> list[str]:
    return [block for page in ("README.md", "docs/install.md") for block in _BLOCK.findall((ROOT / page).read_text())]


def shown(name: str) -> str:
    """The block of that name; where two pages show it they show the same."""
    start = next(start for start, each in HERE.items() if each == name)
    (block,) = {block for block in blocks() if block.startswith(start)}
    return block


def terminals(block: str) -> str:
    """Each line in a terminal of its own."""
    return "".join(f"{line.partition('#')[0].rstrip()} &\n" for line in block.splitlines())


class Machine:
    """Runs a script where nothing listens yet, in a folder like a clone after `make install`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".venv").symlink_to(sys.prefix)
        for name in ("NAME", "OTHER"):
            shutil.copytree(SIM_MODEL, folder / "models" / name)

    def run(self, script: str) -> str:
        alone = ["unshare", "--user", "--map-root-user", "--net"]
        if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
            alone = ["flock", str(Path(tempfile.gettempdir()) / "headrace-default-ports")]
        begin = f'"{sys.executable}" -c "{_LOOPBACK_UP}"\n' if alone[0] == "unshare" else ""
        path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        env |= {"PATH": path, "HEADRACE_ENGINE": "sim", "HEADRACE_CACHE": str(self.folder / "cache")}
        (self.folder / "script").write_text(
            f"set -eu\ntrap 'kill $(jobs -p) 2>&1 || true; wait' EXIT\n{begin}"
            'until_it_works() { until "$@" >/dev/null 2>&1; do sleep 0.1; done; }\n'
            + script.replace("/models/", f"{self.folder}/models/")
        )
        ran = subprocess.run(
            [*alone, "timeout", str(PATIENCE_S), "bash", "script"],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout
        return ran.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_each_block_runs_here_or_is_known_to_run_elsewhere():
    begun = [*HERE, *ELSEWHERE]
    assert [block for block in blocks() if not any(block.startswith(start) for start in begun)] == []
    assert [start for start in begun if not any(block.startswith(start) for block in blocks())] == []


def test_the_pieces_by_themselves_with_a_second_model_and_an_adapter(machine):
    *begun, last = shown("pieces").strip().splitlines()
    activate, *processes = begun
    said = machine.run(
        f"{activate}\n{terminals(chr(10).join(processes))}"
        "until_it_works curl --fail http://127.0.0.1:8000/health\n"
        f"{terminals(shown('embedding'))}"
        "until_it_works sh -c 'curl -s http://127.0.0.1:8000/v1/models | grep OTHER'\n"
        f"{last}\n"
        "curl -s http://127.0.0.1:8000/v1/models\n"
        + shown("adapters").replace("/adapters/poet", str(machine.folder / "models" / "NAME"))
    )
    assert re.search(r"prefill-\w+ +prefill", said), said
    assert re.search(r"decode-\w+ +decode", said), said
    assert '"NAME"' in said
    assert '"OTHER"' in said


def test_the_first_question_and_what_to_look_at_next(machine):
    said = machine.run(
        "headrace up --served-model-name smollm2-135m >up.log 2>&1 &\n"
        "until_it_works curl --fail http://127.0.0.1:8000/health\n"
        "until_it_works grep export up.log; eval \"$(grep -o 'export .*' up.log | sed 's: for headrace.*::')\"\n"
        + shown("asking")
        + shown("terminal")
        .replace("headrace top ", "headrace top --once ")
        .replace("headrace chat ", "echo Hello | headrace chat ")
    )
    assert "data: [DONE]" in said
    assert said.count("decode-1") > 2


def test_keys(machine):
    create, list_, rotate, revoke = shown("keys").strip().splitlines()
    said = machine.run(
        "headrace etcd >/dev/null 2>&1 &\nuntil_it_works headrace keys list\n"
        f"{create}\nkey=$(headrace keys list | grep -o 'key_[0-9a-f]*')\n"
        + "\n".join(line.replace("key_0123456789ab", '"$key"') for line in (list_, rotate, revoke))
    )
    assert "search" in said
