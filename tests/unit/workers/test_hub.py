"""Models at the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_cache import COMMIT, write_hub_cache
from workers.settings import SIM_MODEL, WorkerSettings

ASK = """
import sys
from pathlib import Path
from workers.hub import fetched_model
from planes.wire.errors import HeadraceError
try:
    print(fetched_model(sys.argv[1], sys.argv[2] or None, has_weights=sys.argv[3] == "1", progress=lambda _: None))
except HeadraceError as exc:
    print(f"refused: {exc}")
"""


@pytest.fixture
def cache(tmp_path):
    """With the simulated engine's model in it, as org/tiny."""
    write_hub_cache(tmp_path, "org/tiny", SIM_MODEL)
    return tmp_path


@pytest.fixture
def ask(cache):
    """In a process of its own: the hub's library reads its environment when it is imported."""

    def ask(model, revision="", *, has_weights=False, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        told = kept | {"HF_HOME": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"} | environment
        command = [sys.executable, "-c", ASK, model, revision, "1" if has_weights else ""]
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.strip()

    return ask


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_cached_model_needs_no_network(ask, cache, revision):
    found = Path(ask("org/tiny", revision, HF_HUB_OFFLINE="1"))
    assert found == cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert (found / "tokenizer.json").read_bytes() == (SIM_MODEL / "tokenizer.json").read_bytes()


def test_what_is_neither_cached_nor_reachable_is_told_in_one_line(ask, cache):
    offline = ask("org/other", HF_HUB_OFFLINE="1")
    assert offline.startswith(f"refused: org/other is no directory here, not in the hub's cache {cache / 'hub'}, and ")
    assert "HF_HUB_OFFLINE is set" in offline
    assert "\n" not in offline
    unknown = ask("org/tiny", "v9", HF_HUB_OFFLINE="1")
    assert unknown.startswith("refused: org/tiny at revision v9 is no directory here, not in the hub's cache")


def test_a_hub_that_does_not_answer_is_no_reason_to_be_without_a_cached_model(ask):
    assert ask("org/tiny").endswith(COMMIT)
    assert "the hub cannot be asked" in ask("org/other")


def test_a_snapshot_without_what_an_engine_needs_is_named(ask, cache):
    (cache / "hub" / "models--org--tiny" / "snapshots" / COMMIT / "tokenizer.json").unlink()
    assert ask("org/tiny", HF_HUB_OFFLINE="1").endswith("has no tokenizer.json")


@pytest.mark.parametrize(("engine", "has_weights"), [("vllm", True), ("sim", False)])
def test_a_model_of_the_hub_is_called_by_its_id(tmp_path, engine, has_weights):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    asked = []

    def fetched(*args, **kwargs):
        asked.append((args, kwargs))
        return tmp_path

    settings = WorkerSettings(engine=engine, model=Path("org/name"), revision="v1")
    made = settings.with_model(pytest.fail, fetched)
    assert (made.model_path, made.model_name, settings.model_name) == (tmp_path, "org/name", "org/name")
    assert asked == [(("org/name", "v1"), {"has_weights": has_weights})]
    named = WorkerSettings(engine=engine, model=Path("org/name"), served_model_name="mill").with_model(
        pytest.fail, fetched
    )
    assert named.model_name == "mill"
