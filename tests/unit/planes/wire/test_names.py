"""Namespaces and subject tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planes.wire.names import check_namespace, subject_token


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "a/b", "ü", "x" * 65, "a\n"])
def test_a_namespace_that_cannot_be_a_subject_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        check_namespace(namespace)


def test_a_plain_namespace_is_taken_as_it_is() -> None:
    assert check_namespace("prod-EU_1") == "prod-EU_1"


@given(st.text(st.characters(codec="utf-8")))
def test_every_text_becomes_one_token(name: str) -> None:
    token = subject_token(name)
    assert token
    assert not set(token) & set(". *>/\\\t\r\n")


def test_plain_names_stay_readable() -> None:
    assert subject_token("prefill-0_a") == "prefill-0_a"
    assert subject_token("google/gemma-3.1") == "google%2Fgemma-3%2E1"
