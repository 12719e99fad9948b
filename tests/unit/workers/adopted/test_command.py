import msgspec
import pytest
import structlog

from process.settings import run
from workers.adopted.command import ModelFiles, app

CONFIG = {
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "eos_token_id": 2,
}


def files(folder, config):
    (folder / "tokenizer.json").write_text("{}")
    if config is not None:
        (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return ModelFiles.read(folder)


def test_a_model_s_files_tell_what_its_server_does_not(tmp_path):
    assert files(tmp_path, CONFIG) == ModelFiles((2,), 49152, 2 * 2 * 30 * 3 * 64)


def test_a_model_with_images_describes_its_text_apart(tmp_path):
    assert files(tmp_path, {"text_config": CONFIG | {"head_dim": 128}}).bytes_per_token == 2 * 2 * 30 * 3 * 128


def test_without_a_configuration_nothing_is_known(tmp_path):
    assert files(tmp_path, None) == ModelFiles((), 0, 0)


@pytest.fixture
def _own_log():
    """What the command sets up for its log goes to a file that is closed when the test has ended."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_own_log")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["10.0.0.7:8000"], "--server is '10.0.0.7:8000': it must be the URL of a vLLM server"),
        (["http://127.0.0.1:9", "--wait-s", "0"], "no vLLM server at 127.0.0.1:9"),
        ([], "SERVER"),
    ],
)
def test_a_server_that_cannot_be_adopted_ends_the_start_with_one_line(arguments, told, capsys):
    assert run(app, arguments) == 2
    assert told in capsys.readouterr().err
