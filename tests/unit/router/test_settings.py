import pytest

from router.settings import RouterSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("queue_limit", 0),
        ("quantum_tokens", 0),
        ("history", 0),
        ("aging", 0.0),
        ("promote_after_s", -1.0),
        ("report_delay_s", -0.1),
        ("slo_ttft_s", 0.0),
        ("aging", float("nan")),
    ],
)
def test_an_unusable_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        RouterSettings(**{name: value})
