from planes.probes import CONVERSATIONS, EDITION, TEXTS, differ, digest


def told(chat=lambda _: [1], text=lambda _: [2]):
    return digest(chat, text)


def test_the_digest_is_the_same_for_the_same_tokens():
    assert told() == told()
    assert told().startswith(f"{EDITION}:")


def test_only_digests_of_one_edition_differ():
    assert differ("1:a", "1:b")
    assert not any((differ("1:a", "1:a"), differ("1:a", "2:b"), differ("", "1:a"), differ("1:a", "")))


def test_one_token_more_or_other_in_one_probe_is_another_digest():
    found = {told()}
    for odd in CONVERSATIONS:
        found.add(told(chat=lambda probe, odd=odd: [1, 1] if probe is odd else [1]))
        found.add(told(chat=lambda probe, odd=odd: None if probe is odd else [1]))
    for odd in TEXTS:
        found.add(told(text=lambda text, odd=odd: [3] if text is odd else [2]))
    assert len(found) == 1 + 2 * len(CONVERSATIONS) + len(TEXTS)


def test_a_refused_conversation_is_not_an_empty_one():
    assert told(chat=lambda _: None) != told(chat=lambda _: [])


def test_where_one_prompt_ends_and_the_next_begins_counts():
    first = iter([[1, 2], [3], *[[4]] * 10])
    second = iter([[1], [2, 3], *[[4]] * 10])
    assert told(chat=lambda _: next(first)) != told(chat=lambda _: next(second))
