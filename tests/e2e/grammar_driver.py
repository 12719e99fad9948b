"""Grammars that were advanced by resumed tokens, against those that generated them; `grammar_driver.py FOLDER`.

vLLM's manager and libraries are real, engine and model there are none: any token that the mask allows may come next.
The vocabulary is the bytes; after them come the end of the answer and the end of reasoning.
"""

import json
import random
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import xgrammar
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from workers.vllm.grammars import expect_tokenizer
from workers.vllm.plugin import grammars
from workers.vllm.request import RESUME

END, THOUGHT_ENDS, VOCAB_SIZE = 256, 257, 258
GRAMMARS = (
    {"json": '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","y"]}},"required":["a","b"]}'},
    {"json": '{"type":"array","items":{"type":"string","maxLength":3},"minItems":1,"maxItems":3}'},
    {"regex": "(ab|a)*c{2,4}[0-9]?"},
    {"grammar": 'root ::= "(" root ")" | "x" | root "+" root'},
)


class Reasoner:
    """As vLLM's parsers for thoughts that one token ends."""

    def __init__(self, tokenizer):
        pass

    def is_reasoning_end(self, tokens):
        return THOUGHT_ENDS in tokens

    def is_reasoning_end_streaming(self, tokens, delta):
        return THOUGHT_ENDS in delta


def manager(*, is_thinking):
    made = object.__new__(StructuredOutputManager)
    made.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB_SIZE),
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=False),
    )
    made.reasoner_cls = Reasoner if is_thinking else None
    made.enable_in_reasoning, made.tokenizer = False, None
    return made


def request_for(grammar, resumed, *, is_thinking):
    params = StructuredOutputsParams(**grammar)
    params._backend = "xgrammar"
    sampling = SamplingParams(structured_outputs=params, stop_token_ids=[END], extra_args={RESUME: resumed})
    return SimpleNamespace(
        request_id="r",
        use_structured_output=True,
        sampling_params=sampling,
        prompt_token_ids=[1, 2, 3],
        all_token_ids=[1, 2, 3, *resumed],
        structured_output_request=StructuredOutputRequest(params, reasoning_ended=None if is_thinking else True),
    )


def mask_of(grammar):
    if grammar.is_terminated():
        return None
    mask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
    grammar.fill_bitmask(mask, 0)
    return np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:VOCAB_SIZE]).tolist()


def answer(on, grammar, rng, *, is_thinking):
    """A random answer, and the mask before each of its tokens; during thoughts there is none."""
    request = request_for(grammar, [], is_thinking=is_thinking)
    state = request.structured_output_request
    state.grammar = made = grammars.create_grammar(on, request)
    tokens, masks = [], []
    num_thoughts = rng.randrange(5) if is_thinking else 0
    for place in range(num_thoughts + is_thinking + 40):
        is_thought = place < num_thoughts + is_thinking
        masks.append(None if is_thought else mask_of(made))
        if not is_thought and masks[-1] is None:
            break
        thought = THOUGHT_ENDS if place == num_thoughts else rng.randrange(256)
        tokens.append(thought if is_thought else rng.choice(masks[-1]))
        request.all_token_ids.append(tokens[-1])
        assert on.accept_tokens(request, tokens[-1:])
    return tokens, masks


def has_a_regex_a_limit():
    """Whether another thread compiles it, which this one could stop to wait for."""
    on, threads = manager(is_thinking=False), []
    grammars.create_grammar(on, request_for({"regex": "a"}, [], is_thinking=False))
    compiler = on.headrace_backends["xgrammar"].compiler
    compile_regex = compiler.compile_regex

    def compile_noting_the_thread(pattern):
        threads.append(threading.current_thread())
        return compile_regex(pattern)

    compiler.compile_regex = compile_noting_the_thread
    grammars.create_grammar(on, request_for({"regex": "b"}, [], is_thinking=False))
    (thread,) = threads
    return thread is not threading.current_thread()


def main(folder, num_answers):
    vocabulary = [*(bytes([byte]) for byte in range(256)), "<end>", "</think>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
    expect_tokenizer(folder).write_text(info.serialize_json())
    grammars.install()
    num_compared = num_ended = 0
    for seed in range(num_answers):
        rng, is_thinking = random.Random(seed), seed % 2 == 0
        on, grammar = manager(is_thinking=is_thinking), GRAMMARS[seed // 2 % len(GRAMMARS)]
        tokens, masks = answer(on, grammar, rng, is_thinking=is_thinking)
        num_ended += tokens[-1] == END
        for place in range(len(tokens)):
            request = request_for(grammar, tokens[:place], is_thinking=is_thinking)
            resumed = grammars.create_grammar(on, request)
            has_ended = request.structured_output_request.reasoning_ended
            assert bool(has_ended) is (not is_thinking or THOUGHT_ENDS in tokens[:place]), (seed, place)
            if masks[place] is not None:
                assert mask_of(resumed) == masks[place], (seed, place)
                num_compared += 1
    wrong = request_for({"regex": "a"}, [98], is_thinking=False)
    try:
        grammars.create_grammar(manager(is_thinking=False), wrong)
    except grammars.GrammarRejectsResume as exc:
        refused = str(exc)
    told = {"compared": num_compared, "ended": num_ended, "refused": refused}
    sys.stdout.write(json.dumps(told | {"has_limit": has_a_regex_a_limit()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), 120)
