import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest

from loadtest import workloads


def shared_blocks(one, other):
    same = one[: min(len(one), len(other))] == other[: min(len(one), len(other))]
    return int(np.cumprod(same).sum())


@pytest.fixture
def trace(tmp_path):
    records = [
        {"timestamp": 0, "input_length": 1025, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 0, "input_length": 1024, "output_length": 6, "hash_ids": [0, 3]},
        {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 4]},
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_a_trace_names_full_blocks_only(trace):
    turns = [session.turns[0] for session in workloads.read_trace(trace, block_size=512, seed=1).sessions]
    assert [(turn.prompt_tokens, turn.completion_tokens, len(turn.blocks)) for turn in turns] == [
        (1025, 5, 2),
        (1024, 6, 2),
        (600, 7, 1),
    ]
    assert shared_blocks(turns[0].blocks, turns[1].blocks) == 1
    assert shared_blocks(turns[0].blocks, turns[2].blocks) == 1


def test_smaller_blocks_share_what_their_trace_blocks_share(trace):
    turns = [session.turns[0] for session in workloads.read_trace(trace, block_size=64, seed=1).sessions]
    assert [len(turn.blocks) for turn in turns] == [16, 16, 9]
    assert shared_blocks(turns[0].blocks, turns[1].blocks) == 8
    assert len(set(turns[0].blocks.tolist())) == 16


def test_a_block_size_that_does_not_divide_the_traces_is_refused(trace):
    with pytest.raises(ValueError, match="block size 48 does not divide"):
        workloads.read_trace(trace, block_size=48, seed=1)


def test_arrivals_of_a_batch_are_spread_until_the_next(trace):
    starts = [session.start_s for session in workloads.read_trace(trace, block_size=512, seed=1).sessions]
    assert starts == sorted(starts)
    assert 0 <= starts[0] < starts[1] < 3 <= starts[2] < 6


def test_arrivals_of_one_instant_before_a_pause_stay_together(tmp_path):
    path = tmp_path / "pause.jsonl"
    stamps = [1000, 1001, 1001, 60_000]
    lines = ({"timestamp": at, "input_length": 1, "output_length": 1, "hash_ids": [0]} for at in stamps)
    path.write_text("\n".join(json.dumps(line) for line in lines))
    starts = [session.start_s for session in workloads.read_trace(path, block_size=512, seed=1).sessions]
    assert starts[0] <= starts[1] <= starts[2] < 0.004
    assert starts[3] >= 59


def test_a_folder_of_traces_is_one_trace(trace, tmp_path):
    folder = tmp_path / "recorded"
    folder.mkdir()
    first, second, third = trace.read_text().splitlines()
    (folder / "b.jsonl").write_text(f"{first}\n{second}\n")
    (folder / "process-2").mkdir()
    (folder / "process-2" / "a.jsonl.gz").write_bytes(gzip.compress(third.encode()))
    (folder / "notes.txt").write_text("no trace")
    whole = workloads.read_trace(workloads.find_trace(str(folder)), block_size=512, seed=1)
    assert whole.name == "recorded"
    assert [each.turns[0].prompt_tokens for each in whole.sessions] == [1025, 1024, 600]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"timestamp": 0, "input_length": 1025, "output_length": 5, "hash_ids": [0]}', "1 hash_ids for 1025 tokens"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 5}', "missing required field `hash_ids`"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 5, "hash_ids": [0]}', "got `str`"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}', ">= 1"),
        ("[1]", "got `array`"),
        ("{", "truncated"),
    ],
)
def test_a_trace_with_a_bad_line_is_refused_with_its_number(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 5, "hash_ids": [0]}\n' + line)
    with pytest.raises(ValueError, match=f"bad.jsonl:2: .*{words}"):
        workloads.read_trace(path, block_size=512, seed=1)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: b"plain", lambda whole: whole[:12] + b"\xff" * 30]
)
def test_a_compressed_trace_that_is_damaged_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b"{}\n" * 100)))
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz cannot be decompressed: "):
        workloads.read_trace(path, block_size=512, seed=1)


def test_a_trace_without_requests_is_refused(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no request"):
        workloads.read_trace(path, block_size=512, seed=1)


def test_an_unknown_trace_names_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no trace 'nothing'.*shared_prefix"):
        workloads.find_trace("nothing")


def test_the_conversation_trace_is_whole():
    workload = workloads.load("conversation", block_size=512, seed=0)
    assert workload.num_requests == 12_031
    assert workload.name == "mooncake_conversation"
    assert sum(session.turns[0].prompt_tokens for session in workload.sessions) / 12_031 == pytest.approx(12_035, abs=1)


def test_azures_conversation_trace_is_whole():
    workload = workloads.load("azure_2023_conversation", block_size=512, seed=0)
    assert workload.num_requests == 19_366
    prompts = sorted(session.turns[0].prompt_tokens for session in workload.sessions)
    assert prompts[len(prompts) // 2] == 1_020
    names = np.concatenate([session.turns[0].blocks for session in workload.sessions])
    assert len(np.unique(names)) == len(names)


@pytest.mark.parametrize("name", workloads.GENERATORS)
def test_the_same_seed_draws_the_same_load(name):
    first, second, other = (workloads.load(name, block_size=512, seed=seed) for seed in (1, 1, 2))
    starts = [[session.start_s for session in load.sessions] for load in (first, second, other)]
    assert starts[0] == starts[1] != starts[2]
    assert starts[0] == sorted(starts[0])
    for mine, theirs in zip(first.sessions, second.sessions, strict=True):
        assert all(np.array_equal(a.blocks, b.blocks) for a, b in zip(mine.turns, theirs.turns, strict=True))


def test_shared_prefix_has_750_prompts_in_150_groups_and_ramps_up():
    sessions = workloads.load("shared_prefix", block_size=16, seed=3).sessions
    assert len({session.turns[0].blocks.tobytes() for session in sessions}) == 750
    assert len({session.turns[0].blocks[: 6000 // 16].tobytes() for session in sessions}) == 150
    early = sum(session.start_s < 10 for session in sessions)
    late = sum(session.start_s >= 90 for session in sessions)
    assert early == pytest.approx(10 * 5.85, rel=0.4)
    assert late == pytest.approx(10 * 57.15, rel=0.15)


def test_agents_keep_their_whole_past_in_the_prompt():
    first, second = workloads.load("agentic", block_size=16, seed=3).sessions[:2]
    assert len(first.turns) == 30
    assert [turn.prompt_tokens for turn in first.turns[:2]] == [32_048, 34_996]
    assert shared_blocks(first.turns[0].blocks, first.turns[1].blocks) == (32_048 + 900) // 16
    assert shared_blocks(first.turns[0].blocks, second.turns[0].blocks) == 20_000 // 16


def test_prefixes_repeat_and_suffixes_do_not():
    sessions = workloads.load("prefix_repetition", block_size=128, seed=3).sessions
    assert len({session.turns[0].blocks[3] for session in sessions}) == 100
    assert len({session.turns[0].blocks[4] for session in sessions}) == len(sessions)


def test_nothing_is_shared_in_the_uniform_load():
    names = np.concatenate([s.turns[0].blocks for s in workloads.load("uniform", block_size=64, seed=3).sessions])
    assert len(np.unique(names)) == len(names)


def test_scaling_speeds_up_starts_and_leaves_think_times():
    workload = workloads.load("agentic", block_size=512, seed=3)
    fast = workload.scaled(2.0)
    assert fast.sessions[5].start_s == workload.sessions[5].start_s / 2
    assert fast.sessions[5].turns[3].think_s == workload.sessions[5].turns[3].think_s
    with pytest.raises(ValueError, match="rate scale is 0"):
        workload.scaled(0)


def test_tools_are_shared_between_sessions_and_turns_are_few():
    sessions = workloads.load("tools", block_size=16, seed=3).sessions
    kinds = Counter(session.turns[0].blocks[1000 // 16 - 1] for session in sessions)
    assert len(kinds) <= 60
    assert kinds.most_common(1)[0][1] > len(sessions) / 10
    turns = [len(session.turns) for session in sessions]
    assert max(turns) <= 12
    assert sum(turns) / len(turns) == pytest.approx(3.5, rel=0.25)
    assert all(turn.think_s >= 5 for session in sessions for turn in session.turns[1:])


def test_some_documents_are_asked_about_far_more_often_than_others():
    sessions = workloads.load("documents", block_size=16, seed=3).sessions
    asked = Counter(session.turns[0].blocks[2000 // 16 - 1] for session in sessions)
    assert 200 < len(asked) <= 400
    assert asked.most_common(1)[0][1] > 5 * len(sessions) / 400


def test_bursts_come_once_a_minute():
    sessions = workloads.load("bursts", block_size=16, seed=3).sessions
    wave = sum(session.start_s % 60 < 15 for session in sessions)
    assert wave / 75 == pytest.approx(14, rel=0.15)
    assert (len(sessions) - wave) / 225 == pytest.approx(2.5, rel=0.15)


def test_code_completion_has_long_prompts_short_answers_and_bursts():
    drawn = [workloads.load("code", block_size=64, seed=seed).sessions for seed in range(3)]
    assert all(len(sessions) == 1500 for sessions in drawn)
    turns = [session.turns[0] for sessions in drawn for session in sessions]
    prompts, answers = (
        np.array([getattr(turn, of) for turn in turns]) for of in ("prompt_tokens", "completion_tokens")
    )
    assert np.quantile(prompts, [0.5, 0.9]) == pytest.approx([1450, 5100], rel=0.1)
    assert prompts.max() == 7400
    assert np.quantile(answers, [0.5, 0.9]) == pytest.approx([13, 54], rel=0.15)
    names = np.concatenate([session.turns[0].blocks for session in drawn[0]])
    assert len(np.unique(names)) == len(names)
    assert drawn[0][-1].start_s == pytest.approx(1500 / 2.2)


def test_bursty_gaps_have_the_coefficient_of_variation_asked_for():
    gaps = np.array(list(workloads.bursty_gaps(random.Random(1), 400_000, cv=14.0, pauses=1 / 133)))
    assert gaps.mean() == pytest.approx(1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(14, rel=0.05)
    assert np.median(gaps) < 0.15


def test_gaps_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match=r"a share of 0.5 of long gaps cannot give .* 14.0"):
        next(workloads.bursty_gaps(random.Random(1), 1, cv=14.0, pauses=0.5))


def test_a_flood_is_one_tenant_beside_three_that_ask_steadily():
    sessions = workloads.load("flood", block_size=16, seed=3).sessions
    loud = [session.start_s for session in sessions if session.tenant == "loud"]
    assert 20 <= min(loud) <= max(loud) < 40
    assert len(loud) == pytest.approx(600, rel=0.15)
    steady = Counter(session.tenant for session in sessions if session.tenant != "loud")
    assert set(steady) == {"a", "b", "c"}
    assert all(count == pytest.approx(120, rel=0.3) for count in steady.values())
