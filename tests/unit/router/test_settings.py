import pytest

from router.settings import ModelSlos, RouterSettings


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


def test_an_unusable_value_of_a_model_is_named_with_the_model():
    with pytest.raises(ValueError, match=r"models\.org/m-1\.5\.slo_itl_s is -1"):
        RouterSettings(models={"fine": ModelSlos(slo_ttft_s=1.0), "org/m-1.5": ModelSlos(slo_itl_s=-1.0)})
