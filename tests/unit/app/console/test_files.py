import re

from app.console.files import FOLDER, HEADERS, page_files


def test_the_page_asks_for_files_that_there_are_and_for_nothing_from_outside():
    files = page_files()
    asked = set(re.findall(r'(?:href|src)="([^"#]+)"', files["index.html"].content.decode()))
    assert {name.removeprefix("console/") for name in asked} <= set(files)
    for name, file in files.items():
        if name.endswith(".js") and not name.startswith("vendor/"):
            for found in re.findall(r'^import .* from "(.+)";$', file.content.decode(), flags=re.MULTILINE):
                assert found.removeprefix("./") in files, (name, found)
    text = "".join(file.content.decode() for name, file in files.items() if not name.startswith("vendor/"))
    assert set(re.findall(r"https?://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_has_nothing_that_its_policy_forbids():
    page = page_files()["index.html"].content.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:", page) == []
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_what_is_vendored_has_its_version_and_license_beside_it():
    assert re.search(r"uPlot \d+\.\d+\.\d+, MIT", (FOLDER / "vendor" / "README.md").read_text())
    assert "MIT" in (FOLDER / "vendor" / "LICENSE").read_text()
    assert not {"vendor/LICENSE", "vendor/README.md"} & set(page_files()), "they are not served"


def test_a_file_that_changes_has_another_tag(tmp_path):
    (tmp_path / "a.js").write_text("1")
    before = page_files(tmp_path)["a.js"].etag
    (tmp_path / "a.js").write_text("2")
    assert page_files(tmp_path)["a.js"].etag != before
