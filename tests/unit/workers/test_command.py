"""What stands after `--` on a worker's command line."""

import pytest

from app.cli import commands
from planes.wire.errors import UnusableSetting
from workers import command
from workers.settings import WorkerSettings


@pytest.fixture
def settings(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return WorkerSettings(model=tmp_path, engine_args="--seed 1")


def test_engine_arguments_follow_those_of_the_setting(settings):
    words = ("--seed", "2", "--hf-overrides", '{"a": 1}')
    assert command.with_engine_words(settings, words).engine_words() == ("--seed", "1", *words)
    assert command.with_engine_words(settings, ()) is settings


def test_a_word_that_is_no_flag_is_no_engine_argument(settings):
    with pytest.raises(UnusableSetting, match="--engine-args is 'decode'"):
        command.with_engine_words(settings, ("decode",))


def test_both_command_lines_leave_what_follows_the_dashes_to_the_engine():
    line = ["--role", "decode", "--", "--quantization", "fp8"]
    _, outer, _ = commands.app.parse_args(["worker", *line])
    assert list(outer.args) == line
    _, inner, _ = command.app.parse_args(line)
    assert (inner.args, inner.kwargs["settings"].role) == (("--quantization", "fp8"), "decode")
