"""Prints what an extra of Headrace needs, Headrace itself aside: `requirements.py cpu`, run beside pyproject.toml."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
needed = {*project["dependencies"], *extras["local"], *extras[sys.argv[1]]}
print(*sorted(name for name in needed if not name.startswith("headrace[")), sep="\n")
