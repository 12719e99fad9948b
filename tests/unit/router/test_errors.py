import pytest

from router.errors import SloMissed


@pytest.mark.parametrize(
    ("predicted_s", "slo_s", "words"),
    [
        (0.0123, 0.005, "first token predicted after 0.0123 s and the limit is 0.005 s;"),
        (0.012, 0.000001, "first token predicted after 0.012 s and the limit is 1e-06 s;"),
        (3.14159, 2.5, "first token predicted after 3.142 s and the limit is 2.5 s;"),
    ],
)
def test_a_refusal_tells_what_was_predicted_and_the_limit_apart(predicted_s, slo_s, words):
    assert str(SloMissed(predicted_s, slo_s, retry_after_s=None)).startswith(words)
