"""What a bench leaves behind: its figures in JSON, its tables in Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(folder: Path, name: str, result: dict[str, Any], parts: Sequence[str]) -> None:
    """`name`.json and `name`.md; the latter is printed, too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n\n".join(parts) + "\n"
    (folder / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten: {folder}/{name}.json, {folder}/{name}.md")


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, *lines]
    rows = ["| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])
