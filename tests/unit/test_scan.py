"""`docker/scan.sh`: well, known faults and what could not be looked up are never taken for one another."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APT, TRACKER, ADVISORIES = (
    "Debian's pending updates",
    "Debian's security tracker, what has a fix",
    "Python's advisories",
)
PROGRAMS = {
    "docker": """
        for last; do :; done
        case $last in *importlib*) echo jinja2==3.1.6; exit ${LIST_LOST:-0};; *) exec sh -c "$last";; esac""",
    # As apt does: what could not be fetched is a warning unless it is told otherwise.
    "apt-get": """
        case "$*" in
            *--error-on=any*) exit $((APT_LOST * 100));;
            *upgrade*) echo "$APT_PENDING"; exit ${UPGRADE_LOST:-0};;
        esac""",
    "debsecan": 'test -z "$TRACKER_LOST" || { echo "error: while downloading"; exit 1; }; echo "$TRACKER_OPEN"',
    "pip-audit": 'case $AUDIT_SAYS in "") ;; *) echo "$AUDIT_SAYS"; exit 1;; esac',
}


@pytest.fixture
def scan(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def run(**variables):
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        environ = {"PATH": path, "AUDIT": str(tmp_path), "APT_LOST": "0"} | variables
        done = subprocess.run(
            ["bash", "docker/scan.sh", "an/image"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        told = [line.rsplit(": ", 1) for line in done.stdout.splitlines() if line.startswith(("Debian", "Python"))]
        return done.returncode, dict(told)

    return run


def test_an_image_of_which_nothing_is_known_is_well(scan):
    assert scan() == (0, {APT: "well", TRACKER: "well", ADVISORIES: "well"})


@pytest.mark.parametrize(
    ("variables", "where", "told"),
    [
        ({"APT_LOST": "1"}, APT, "NOT LOOKED UP"),
        ({"UPGRADE_LOST": "100"}, APT, "NOT LOOKED UP"),
        ({"APT_PENDING": "Inst libc6 [2.36-9] (2.36-10)"}, APT, "FAULTS"),
        ({"TRACKER_LOST": "1"}, TRACKER, "NOT LOOKED UP"),
        ({"TRACKER_OPEN": "libc6"}, TRACKER, "FAULTS"),
        ({"LIST_LOST": "125"}, ADVISORIES, "NOT LOOKED UP"),
        ({"AUDIT_SAYS": "ERROR:pip_audit._cli: no such host"}, ADVISORIES, "NOT LOOKED UP"),
        ({"AUDIT_SAYS": "Found 1 known vulnerability in 1 package"}, ADVISORIES, "FAULTS"),
    ],
)
def test_what_is_known_and_what_could_not_be_looked_up_are_told_apart(scan, variables, where, told):
    status, all_told = scan(**variables)
    assert status == 1
    assert all_told == {APT: "well", TRACKER: "well", ADVISORIES: "well"} | {where: told}
