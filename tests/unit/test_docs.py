"""What the documents say of themselves: links lead somewhere, decisions are dated and listed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "loadtest").rglob("*.md")])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_pages():
    assert len(PAGES) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_one_dated_page_in_the_index(decision):
    text = decision.read_text()
    number = int(decision.name[:4])
    assert re.match(rf"# {number}\. .+\n\nDate: 20\d\d-\d\d-\d\d.* Status: ", text), "begin it as the others begin"
    assert len(text.splitlines()) <= 60, "one page: measurements that go on belong into docs/measurements.md"
    assert f"]({decision.name})" in (decision.parent / "README.md").read_text(), "docs/adr/README.md lists all"


def test_the_site_is_built_without_a_warning_and_asks_nobody_for_anything(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "security.html", "adopt.html"} <= {page.name for page in pages}
    fetched = re.compile(r'<(?:script|img|link rel="(?:stylesheet|icon|preconnect)")[^>]* (?:src|href)="https?:')
    assert [page.name for page in pages if fetched.search(page.read_text())] == []


def test_every_make_target_is_explained():
    lines = (ROOT / "Makefile").read_text().splitlines()
    named = next(line for line in lines if line.startswith(".PHONY:")).split()[1:]
    explained = {line.split(":")[0] for line in lines if re.match(r"[a-z-]+:.*## ", line)}
    assert set(named) == explained
