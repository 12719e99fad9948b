import random
from collections import Counter

import numpy as np

from loadtest.prompts import prose, text_of
from loadtest.workloads import Turn, load


def turn(names, prompt_tokens):
    return Turn(0.0, prompt_tokens, 5, np.array(names, dtype=np.uint64))


def shared_words(one, other):
    pairs = zip(one.split(), other.split(), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.split()), len(other.split())))


def test_a_prompt_has_a_word_for_each_token():
    assert len(text_of(turn([1, 2], 19), 8, seed=0).split()) == 19


def test_prompts_begin_alike_as_far_as_they_share_blocks():
    one, other = (text_of(turn(names, 24), 8, seed=0) for names in ([1, 2, 3], [1, 2, 4]))
    assert 16 <= shared_words(one, other) < 24


def test_what_is_in_no_full_block_is_a_sessions_own():
    one, other = (text_of(turn([1], 15), 8, seed=seed) for seed in (0, 1))
    assert 8 <= shared_words(one, other) < 15


def test_a_later_turn_begins_with_the_earlier_one():
    session = next(each for each in load("agentic", block_size=64, seed=0).sessions if len(each.turns) > 1)
    first, second = (text_of(turn, 64, seed=0) for turn in session.turns[:2])
    assert shared_words(first, second) >= session.turns[0].prompt_tokens // 64 * 64


def test_prose_has_so_many_characters():
    assert [len(prose(random.Random(seed), length)) for seed, length in enumerate((0, 1, 2, 3, 200, 8000))] == [
        *(0, 1, 2, 3, 200, 8000)
    ]


def test_prose_repeats_words_as_people_do():
    counted = Counter(prose(random.Random(1), 100_000).split())
    top, total = sum(count for _, count in counted.most_common(100)), counted.total()
    assert 0.4 < top / total < 0.7
    assert len(counted) > 2000
