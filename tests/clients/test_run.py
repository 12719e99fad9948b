import json
import re
from pathlib import Path

import pytest

from tests.clients.run import CALLS, CLIENTS, ENVIRONMENTS, HERE, SCRIPT, TEXTS, complaint

ANSWERS = [len(text.encode()) + 1 for text in SCRIPT]
WELL = {"calls": CALLS, "texts": TEXTS, "usage": [[100, ANSWERS[0]], [1800, ANSWERS[1]], [2800, ANSWERS[2]]]}


def test_a_conversation_that_went_well_is_told_from_one_that_did_not():
    assert complaint(WELL) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"calls": CALLS[:1]}, "calls"),
        ({"calls": [{"at": "ZÃ¼rich"}, CALLS[1]]}, "calls"),
        ({"texts": [TEXTS[0], "", TEXTS[2]]}, "texts"),
        ({"usage": [[100, 0], [1800, 0], [2800, 0]]}, "answers"),
        ({"usage": [[100, ANSWERS[0]], [700, ANSWERS[1]], [2800, ANSWERS[2]]]}, "history of turn 2"),
        ({"usage": [[100, ANSWERS[0]], [1800, ANSWERS[1]], [2000, ANSWERS[2]]]}, "history of turn 3"),
    ],
    ids=["a call lost", "wrong bytes", "a text lost", "no usage", "the tools' answers lost", "a turn lost"],
)
def test_what_went_wrong_is_named(changes, named):
    assert named in complaint(WELL | changes)


def test_every_client_has_a_script_and_a_pinned_version():
    python = "\n".join(path.read_text() for path in (HERE / "requirements").glob("*.txt"))
    pinned = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+)$", python, flags=re.MULTILINE))
    pinned |= json.loads((HERE / "node" / "package.json").read_text())["dependencies"]
    page = (HERE.parents[1] / "docs" / "clients.md").read_text()
    assert {client.package for client in CLIENTS} == pinned.keys()
    for client in CLIENTS:
        script = Path(client.command()[-1])
        assert script.is_file()
        assert client.environment == "node" or (HERE / "requirements" / f"{client.environment}.txt").is_file()
        assert f"`{client.package}` {pinned[client.package]}" in page
    assert ENVIRONMENTS.name in (HERE.parents[1] / ".gitignore").read_text()
