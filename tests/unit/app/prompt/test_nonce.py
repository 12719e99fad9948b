import pytest

from app.prompt.nonce import without_nonce

USER = {"role": "user", "content": "hi"}


def system(content):
    return ({"role": "system", "content": content}, USER)


@pytest.mark.parametrize("line", ["x-anthropic-billing-header: cc_version=2; cch=9f1;", "X-Other-Billing-Header:7"])
def test_a_line_that_is_new_each_time_is_dropped(line):
    assert without_nonce(system(f"{line}\nYou code.")) == system("You code.")
    assert without_nonce(system(line)) == (USER,)


@pytest.mark.parametrize("text", ["You code.", "", "A header x-a-header: b", "x-ray: no", "You\nx-a-header: b", [1]])
def test_nothing_else_is_touched(text):
    messages = system(text)
    assert without_nonce(messages) is messages
    assert without_nonce(()) == ()
    said = ({"role": "user", "content": "x-a-header: b\nc"},)
    assert without_nonce(said) is said
