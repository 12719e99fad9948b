import json
from pathlib import Path

import pytest

from app.prompt.card import entry_of
from planes.assets import LoadedCard, make_card, read_model_files
from tests.fakes import FACTS
from workers.rendering import rendering_of

SIM = Path("workers/sim/model")


def gateways(directory):
    files = read_model_files(directory)
    return entry_of("m", LoadedCard("0" * 64, make_card(files, model="m", block_size=16), files), FACTS).rendering


@pytest.fixture
def copy(tmp_path):
    for file in SIM.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def reconfigured(directory, **changes):
    config = json.loads((directory / "tokenizer_config.json").read_text()) | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_simulated_engines_model_is_rendered_alike_on_both_sides():
    assert rendering_of(SIM, "sim") == gateways(SIM) != ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n {% if m.name %}\n {{ m.role }}\n {%- endif %}{{ m.content | trim }}\n{% endfor %}",
        "{{ strftime_now('%d %b %Y %H:%M') }}{{ tools | tojson if tools else 'none' }}{{ add_generation_prompt }}",
        "{{ tools | tojson(indent=2) if tools }}{{ messages | tojson }}{{ bos_token }}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}",
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_templates_of_every_kind_are_rendered_alike(copy, template):
    (copy / "chat_template.jinja").write_text(template)
    assert rendering_of(copy, "sim") == gateways(copy)
    assert gateways(copy) != gateways(SIM)


@pytest.mark.parametrize("changes", [{"add_bos_token": True}, {"add_eos_token": True}, {"chat_template": None}])
def test_what_the_configuration_adds_is_added_alike(copy, changes):
    reconfigured(copy, **changes)
    assert rendering_of(copy, "sim") == gateways(copy)


def test_a_model_that_it_cannot_load_is_unknown(copy):
    (copy / "tokenizer.json").write_text("{}")
    assert rendering_of(copy, "sim") == ""


def test_of_several_templates_both_sides_take_the_default(copy):
    named = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    reconfigured(copy, chat_template=[{"name": name, "template": text} for name, text in named.items()])
    assert rendering_of(copy, "sim") == gateways(copy)
    assert gateways(copy) != gateways(SIM)
