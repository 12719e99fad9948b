import asyncio
import json
import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app import recording
from app.recording import EndedRequest, Recorder, hash_ids
from loadtest.workloads import read_trace
from planes.wire.errors import UnusableSetting

KEY = b"k"


def tokens(*parts):
    return np.concatenate([np.full(count, token, dtype=np.uint32) for token, count in parts])


def recorder(folder, *, file_bytes=1 << 20, num_files=4):
    return Recorder(folder, file_bytes=file_bytes, num_files=num_files, wall_clock=lambda: 1000.0, key=KEY)


def lines(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def ended(prompt, at=1000.0, completion_tokens=5):
    return EndedRequest(at, prompt, "model", completion_tokens)


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_ids_are_equal_exactly_as_far_as_prompts_are(num_common, num_own):
    common, own = tokens((7, num_common)), tokens((8, num_own)) if num_own else np.empty(0, np.uint32)
    one, other = hash_ids(common, "m", KEY), hash_ids(np.concatenate([common, own]), "m", KEY)
    assert len(one) == -(-num_common // 512)
    assert len(other) == -(-(num_common + num_own) // 512)
    shared = num_common // 512 + (num_own == 0 and num_common % 512 > 0)
    assert one[:shared] == other[:shared]
    assert not set(one[shared:]) & set(other[shared:])
    assert all(0 <= each < 1 << 32 for each in other)


def test_an_id_stands_for_everything_before_its_blocks_end():
    assert hash_ids(tokens((1, 512), (3, 512)), "m", KEY)[1] != hash_ids(tokens((2, 512), (3, 512)), "m", KEY)[1]


def test_ids_of_another_key_model_or_salt_are_others():
    prompt = tokens((1, 600))
    found = {tuple(hash_ids(prompt, root, key)) for root in ("m", "m\0salt") for key in (b"a", b"b")}
    assert len({each for ids in found for each in ids}) == 8


def test_a_key_is_drawn_for_each_start(tmp_path):
    for name in ("one", "two"):
        made = Recorder(tmp_path / name, file_bytes=1 << 20, num_files=4, wall_clock=lambda: 0.0)
        made.write([ended(tokens((1, 100)))])
    assert lines(tmp_path / "one") != lines(tmp_path / "two")


def test_a_line_tells_arrival_lengths_and_ids_and_nothing_else(tmp_path):
    recorder(tmp_path).write([ended(tokens((1, 513)), at=12.3456, completion_tokens=9)])
    assert lines(tmp_path) == [
        {
            "timestamp": 12345,
            "input_length": 513,
            "output_length": 9,
            "hash_ids": hash_ids(tokens((1, 513)), "model", KEY),
        }
    ]


def test_files_are_rotated_by_size_and_the_oldest_make_room(tmp_path):
    made = recorder(tmp_path, file_bytes=200, num_files=3)
    for number in range(40):
        made.write([ended(tokens((number, 10)), at=number)])
        assert len(list(tmp_path.glob("*.jsonl"))) <= 3
    assert all(path.stat().st_size <= 200 for path in tmp_path.glob("*.jsonl"))
    kept = [line["timestamp"] for line in lines(tmp_path)]
    assert kept == [number * 1000 for number in range(40 - len(kept), 40)]
    assert 4 <= len(kept) <= 6


def test_what_earlier_starts_have_left_counts(tmp_path):
    for second in range(5):
        (tmp_path / f"requests-20200101T00000{second}-aaaa-00001.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not ours")
    recorder(tmp_path, num_files=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    assert names[0] == "notes.txt"
    assert "requests-20200101T000004-aaaa-00001.jsonl" in names


def test_a_line_longer_than_a_file_may_be_is_written_alone(tmp_path):
    made = recorder(tmp_path, file_bytes=10)
    made.write([ended(tokens((1, 10))), ended(tokens((2, 10)))])
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("*.jsonl"))] == [1, 1]


def test_a_disk_that_fails_costs_lines_and_is_counted(tmp_path):
    made = recorder(tmp_path / "gone")
    (tmp_path / "gone").rename(tmp_path / "moved")
    made.write([ended(tokens((1, 10)))])
    assert {gauge.name: gauge.value for gauge in made.gauges()} == {"recorded": 0, "record_left_out": 1}


def test_a_disk_that_is_full_amid_a_line_leaves_whole_lines_alone(tmp_path):
    made = recorder(tmp_path)
    made.write([ended(tokens((1, 10)))])
    (path,) = tmp_path.glob("*.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with capture_logs() as logs:  # of the tests' own file, too, no more may be written
            made.write([ended(tokens((2, 10)))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made.write([ended(tokens((3, 10)))])
    assert [line["event"] for line in logs] == ["record.failed"]
    assert len(lines(tmp_path)) == 2
    assert {gauge.name: gauge.value for gauge in made.gauges()} == {"recorded": 2, "record_left_out": 1}


def test_prompts_that_come_faster_than_they_are_written_are_left_out(tmp_path):
    made = recorder(tmp_path)
    long = np.zeros(recording._MOST_WAITING_TOKENS // 2 + 1, np.uint32)
    for _ in range(2):
        made.ended(long, "m", completion_tokens=1, ago_s=0.0)
    assert {gauge.name: gauge.value for gauge in made.gauges()} == {"recorded": 0, "record_left_out": 1}


def test_a_folder_that_cannot_be_written_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableSetting, match=r"--record is '.*file': it cannot be written to"):
        recorder(tmp_path / "file")


async def test_what_waits_at_the_end_is_written(tmp_path):
    made = recorder(tmp_path)
    task = asyncio.create_task(made.run())
    await asyncio.sleep(0)
    made.ended(tokens((1, 10)), "m", completion_tokens=3, ago_s=2.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(line["timestamp"], line["output_length"]) for line in lines(tmp_path)] == [(997_500, 3)]


def test_the_simulator_reads_what_was_written(tmp_path):
    made = recorder(tmp_path, file_bytes=150)
    shared = tokens((5, 512))
    made.write(
        [
            ended(np.concatenate([shared, tokens((6, 100))]), at=20.0, completion_tokens=4),
            ended(np.concatenate([shared, tokens((7, 600))]), at=10.5, completion_tokens=3),
        ]
    )
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    workload = read_trace(tmp_path, block_size=64, seed=0)
    assert workload.name == tmp_path.name
    first, second = (session.turns[0] for session in workload.sessions)
    assert (first.prompt_tokens, first.completion_tokens) == (1112, 3)
    assert (second.prompt_tokens, second.completion_tokens) == (612, 4)
    assert (first.blocks[:8] == second.blocks[:8]).all()
    assert first.blocks[8] != second.blocks[8]
