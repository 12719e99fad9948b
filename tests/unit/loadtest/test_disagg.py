from dataclasses import asdict

import pytest

from loadtest.client import Sample
from loadtest.disagg import outcome, tables
from loadtest.live import Arrival
from loadtest.slo import Slo


def sample(ttft_s, gaps_s=(), tokens=3, error=""):
    one = Sample(sent_at=10.0, completion_tokens=tokens, error=error, gaps_s=list(gaps_s))
    one.first_token_at = 10.0 + ttft_s
    return one


SLO = Slo(1.0, 0.1)


def of(*samples, kinds=("chat", "long"), slo=SLO):
    arrivals = [Arrival(0.0, kind, "/", {}) for kind in kinds]
    return outcome(arrivals, samples, {"around": 0.006, "engine": 0.6, "planes": 9.0}, 2.0, slo)


def test_chats_and_long_prompts_are_told_apart_and_gaps_are_of_both():
    found = of(sample(0.2, [0.01, 0.03]), sample(2.0, [0.03, 0.05]))
    assert (found.chat_ttft_p50_ms, found.long_ttft_p50_ms) == pytest.approx((200.0, 2000.0))
    assert found.itl_p50_ms == pytest.approx(30.0)
    assert found.tokens_per_s == 3.0


def test_cpu_is_told_per_token_and_etcd_is_nobodys():
    found = of(sample(0.2), sample(0.2))
    assert (found.around_us, found.engine_us) == pytest.approx((1000.0, 100_000.0))


@pytest.mark.parametrize(
    ("late", "share"),
    [(sample(0.9), 1.0), (sample(1.5), 0.5), (sample(0.9, [0.3, 0.0]), 0.5), (sample(0.1, error="no"), 0.5)],
)
def test_goodput_is_what_held_both_slos_of_all_that_came(late, share):
    assert of(sample(0.2), late).goodput == share


def test_the_table_tells_the_spread_and_what_failed():
    rounds = [asdict(of(sample(0.2), sample(ttft))) for ttft in (0.2, 0.4)]
    rounds[1]["failed"] = 1
    (text,) = tables({"slo": {"ttft_s": 2.0, "itl_s": 0.1}, "variants": {"ours": rounds}})
    assert "300 (200 to 400)" in text
    assert "1 of 4" in text
