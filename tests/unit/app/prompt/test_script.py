import json
from pathlib import Path

import numpy as np
import pytest

from app.prompt.prepare import ModelEntry
from app.prompt.script import scripted
from app.prompt.tokenizer import Tokenizer
from planes.wire.errors import InvalidRequest
from planes.wire.frames import unpack_tokens

SIM = Path("workers/sim/model")
TOKENIZER = Tokenizer((SIM / "tokenizer.json").read_bytes(), json.loads((SIM / "tokenizer_config.json").read_text()))
MODEL = ModelEntry("sim", TOKENIZER, None, 4096, 16, TOKENIZER.vocab_size, is_simulated=True)
USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


def said(answers, *messages):
    packed = scripted(json.dumps(answers), messages, MODEL)
    return TOKENIZER.decode(np.array(unpack_tokens(packed), dtype=np.uint32))


def test_each_turn_of_the_assistant_has_its_answer_and_the_last_one_is_said_from_then_on():
    answers = ["one", "two <|end_of_turn|>"]
    assert said(answers, USER) == "one"
    assert said(answers, USER, ASSISTANT, USER) == "two <|end_of_turn|>"
    assert said(answers, USER, ASSISTANT, USER, ASSISTANT, USER) == "two <|end_of_turn|>"
    assert said(answers) == "one"


def test_text_beyond_ascii_may_be_escaped_or_not():
    assert scripted('["\\u00fc"]', (), MODEL) == scripted('["ü"]'.encode().decode("latin-1"), (), MODEL)


@pytest.mark.parametrize("header", ["", "[]", "[1]", '{"a": 1}', "[", '"x"'])
def test_what_is_no_list_of_texts_is_refused(header):
    with pytest.raises(InvalidRequest) as caught:
        scripted(header, (), MODEL)
    assert caught.value.param == "x-headrace-script"
