import msgspec
import pytest

from loadtest.plots import plots
from loadtest.report import Report, Row, fairness, is_good, markdown, page, quantile, slug, summarise, table, write
from loadtest.simulator.records import Ending, Gaps, Record, Result, WorkerTotals
from loadtest.slo import Slo
from planes.wire.messages import Role, WorkerId


def record(sent_at, ttft_s, tpot_s=0.01, ending=Ending.FINISHED, **more):
    fields = {"prompt_tokens": 100, "completion_tokens": 11} | more
    first = sent_at + ttft_s
    return Record(sent_at, ending=ending, first_at=first, last_at=first + 10 * tpot_s, **fields)


@pytest.fixture
def result():
    gaps = Gaps()
    gaps.add(0.01, 99)
    gaps.add(0.3)
    records = [
        record(0.0, 1.0, cached_tokens=50, is_handed_over=True),
        record(1.0, 2.0),
        record(2.0, 9.0),
        record(3.0, 1.0, tpot_s=0.5),
        Record(4.0, 100, 11, ending=Ending.REJECTED),
        Record(5.0, 100, 11, ending=Ending.UNFINISHED),
    ]
    workers = [
        WorkerTotals(WorkerId("p0"), Role.PREFILL, busy_s=6.0, sent_bytes=1 << 30),
        WorkerTotals(WorkerId("p1"), Role.PREFILL, busy_s=2.0),
        WorkerTotals(WorkerId("d0"), Role.DECODE, busy_s=5.0),
    ]
    return Result(records, gaps, workers, duration_s=10.0)


@pytest.fixture
def row(result):
    return summarise(result, load="small x1", fleet="2 prefill + 1 decode", policy="headrace", slo=Slo())


def test_a_row_counts_every_ending(row):
    assert (row.num_requests, row.num_finished, row.num_rejected, row.num_unfinished) == (6, 4, 1, 1)


def test_a_row_has_the_means_and_quantiles_of_its_records(row):
    assert row.ttft_mean_s == pytest.approx(13 / 4)
    assert (row.ttft_p50_s, row.ttft_p99_s) == (1.0, 9.0)
    assert row.itl_p50_s == pytest.approx(0.01, rel=0.011)
    assert row.tpot_p99_s == pytest.approx(0.5)
    assert row.hit_rate == 50 / 400
    assert row.handed_over_share == 0.25


def test_goodput_counts_rejected_and_unfinished_requests_as_bad(row):
    assert row.goodput_share == 2 / 6
    assert row.goodput_per_s == 2 / 5  # arrivals span five seconds


def test_imbalance_is_that_of_the_workers_that_prefill(row):
    assert row.imbalance == 1.5
    assert (row.prefill_utilisation, row.decode_utilisation) == (0.4, 0.5)


def test_a_run_without_requests_has_a_row_too():
    row = summarise(Result([], Gaps(), [], 0.0), load="l", fleet="f", policy="p", slo=Slo())
    assert row.ttft_mean_s is None
    assert "-" in table([row])


def test_good_means_within_both_limits():
    assert is_good(record(0.0, 5.0), Slo())
    assert not is_good(record(0.0, 5.1), Slo())
    assert not is_good(record(0.0, 1.0, tpot_s=0.06), Slo())
    assert is_good(record(0.0, 1.0, completion_tokens=1), Slo())


def test_a_quantile_is_one_of_the_values():
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.0, 0.25, 0.5, 0.99)] == [1.0, 1.0, 2.0, 4.0]


@pytest.fixture
def rows(row):
    return [row, msgspec.structs.replace(row, policy="dynamo", ttft_mean_s=9.0, ttft_p50_s=row.ttft_p50_s)]


def test_the_best_of_a_column_is_bold_where_there_is_one(rows):
    lines = markdown(rows).splitlines()
    assert "### small x1, 2 prefill + 1 decode" in lines
    assert "| headrace | **3.25** | 1.00 |" in next(line for line in lines if line.startswith("| headrace"))


def test_the_terminal_table_is_aligned(rows):
    lines = table(rows).strip().splitlines()
    assert len({len(line) for line in lines[1:]}) == 1


def test_plots_and_page_hold_every_load(rows):
    images = plots([*rows, msgspec.structs.replace(rows[0], load="other x2")])
    assert set(images) == {
        "goodput.png",
        "ttft-small-x1-2-prefill-1-decode.png",
        "ttft-other-x2-2-prefill-1-decode.png",
    }
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    text = page(Report({"seed": 1}, {"python": "3"}, Slo(), rows), images)
    assert text.count("<table>") == 1
    assert 'src="http' not in text


def test_a_report_survives_its_json(rows, tmp_path):
    report = Report({"seed": 1}, {"python": "3"}, Slo(), rows)
    write(report, json=tmp_path / "deep" / "out.json", folder=tmp_path / "html")
    assert msgspec.json.decode((tmp_path / "deep" / "out.json").read_bytes(), type=Report) == report
    assert (tmp_path / "html" / "index.html").exists()


def test_names_of_files_are_plain():
    assert slug("a (x1.2), 8 prefill + 4 decode") == "a-x1-2-8-prefill-4-decode"


def test_a_row_knows_all_its_columns():
    assert len(Row.__struct_fields__) == len(set(Row.__struct_fields__))


@pytest.fixture
def killed(row):
    changed = {"fleet": "2 prefill + 1 decode, a worker killed every 60 s", "calm_fleet": row.fleet}
    return msgspec.structs.replace(row, ttft_mean_s=4.0, itl_p99_s=None, num_kills=5, num_migrations=7, **changed)


def test_a_row_counts_what_faults_did():
    workers = [WorkerTotals(WorkerId("p0"), Role.PREFILL, num_kills=2), WorkerTotals(WorkerId("d0"), Role.DECODE)]
    records = [
        record(0.0, 1.0, num_migrations=2, stall_s=3.5, recomputed_tokens=100),
        record(0.0, 1.0, num_retries=1, recomputed_tokens=30),
        record(0.0, 1.0, num_migrations=1, stall_s=4.5),
        Record(4.0, 100, 11, ending=Ending.FAILED),
    ]
    row = summarise(Result(records, Gaps(), workers, 1.0), load="l", fleet="f", policy="p", slo=Slo())
    assert (row.num_failed, row.num_kills, row.num_retries, row.num_migrations) == (1, 2, 1, 3)
    assert (row.stall_p50_s, row.recomputed_tokens) == (3.5, 130)


def test_the_price_of_faults_is_told_against_the_same_without(rows, killed):
    text = markdown([*rows, killed])
    _, price = text.split("### small x1, 2 prefill + 1 decode, a worker killed every 60 s: what that costs")
    headings, _, cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in price.strip().splitlines())
    told = dict(zip(headings, cells, strict=True))
    assert (told["kills"], told["migrations"], told["TTFT mean s"], told["ITL p99 ms"]) == ("5", "7", "+0.75", "-")
    assert text.count("what that costs") == 1
    assert "what that costs" in table([*rows, killed])
    assert page(Report({}, {}, Slo(), [*rows, killed]), plots([*rows, killed])).count("<table>") == 3


def test_faults_without_the_same_in_calm_have_no_price(killed):
    assert "| -" in markdown([killed]).splitlines()[-1]


def test_fairness_is_a_column_where_there_are_tenants(result, row):
    assert row.fairness is None
    assert "fairness" not in table([row])
    served = [record(second, 0.5, tenant="a") for second in range(30)]
    starved = [record(5.0, 100.0, tenant="b"), Record(6.0, 100, 11, Ending.REJECTED, tenant="c")]
    records = [*served, *starved]
    assert fairness(served) is None
    assert fairness(records) == pytest.approx(0.5)
    found = Result(records, Gaps(), result.workers, duration_s=10.0)
    lines = table([summarise(found, load="x", fleet="y", policy="z", slo=Slo())]).splitlines()
    assert lines[-2].split()[-1] == "fairness"
    assert lines[-1].split()[-1] == "0.500"
