import pytest
from rich.console import Console

from app.cli.top import Look, TopSettings, shown
from planes.wire.errors import UnusableSetting


def worker(name="decode-1", **changed):
    load = {"num_running": 3, "num_waiting": 2, "free_blocks": 25}
    told = {
        "worker": name,
        "role": "decode",
        "model": "sim",
        "state": "ready",
        "is_connected": True,
        "num_streams": 5,
        "facts": {"num_blocks": 100},
        "load": load,
        "refused_because": "",
        "becoming": None,
    }
    return told | changed


def printed(*workers, totals, warnings=(), before=None):
    fleet = {"workers": list(workers), "num_waiting": 4, "warnings": list(warnings)}
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(shown(Look(10.0, fleet, before or {}), Look(12.0, fleet, totals)))
    return capture.get()


def test_rates_are_differences_and_times_are_means_of_what_came_between():
    before = {"headrace_requests_total": 10.0, "headrace_ttft_seconds_sum": 1.0, "headrace_ttft_seconds_count": 2.0}
    totals = {"headrace_requests_total": 30.0, "headrace_ttft_seconds_sum": 2.0, "headrace_ttft_seconds_count": 4.0}
    text = " ".join(printed(worker(), totals=totals, before=before).split())
    assert "4 waiting · 10.0 requests/s" in text
    assert "first token 500 ms" in text
    assert "between tokens" not in text, "nothing came"


def test_a_gateway_that_started_anew_has_no_negative_rates():
    assert "· 0.0 requests/s" in printed(totals={}, before={"headrace_requests_total": 1e6}).replace("\n", " ")


def test_every_worker_has_its_load_and_what_is_wrong_with_it():
    text = printed(
        worker(),
        worker("prefill-1", role="prefill", load=None, is_connected=False),
        worker("both-1", role="both", becoming="decode"),
        worker("odd[bold]", refused_because="another card"),
        totals={},
        warnings=["model 'sim' has 2 different cards"],
    )
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["decode-1"].split()[1:] == ["decode", "sim", "ready", "5", "3", "2", "75%", "████████··"]
    assert "not connected" in lines["prefill-1"]
    assert "both → decode" in lines["both-1"]
    assert "refused: another card" in lines["odd[bold]"]
    assert "has 2 different cards" in text


@pytest.mark.parametrize("every_s", [0.0, float("nan"), 1e9])
def test_a_pace_that_makes_no_sense_is_refused(every_s):
    with pytest.raises(UnusableSetting, match="--every-s"):
        TopSettings(every_s=every_s)
