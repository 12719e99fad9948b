"""What a bench leaves behind: its figures in JSON, its tables in Markdown. Whether it can is asked before it begins."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planes.wire.errors import UnusableSetting


def check_file(setting: str, path: Path | None) -> None:
    """Whether that file can be written once there is something to write. Its folder is made.

    Raises:  UnusableSetting.
    """
    if path is None:
        return
    if path.is_dir():
        raise UnusableSetting(setting, str(path), "that is a folder, and it must be a file")
    check_folder(setting, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UnusableSetting(setting, str(path), "that file may not be written")


def check_folder(setting: str, path: Path | None) -> None:
    """Whether files can be written into that folder, which is made.  Raises:  UnusableSetting."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableSetting(setting, str(path), f"the folder {path} cannot be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UnusableSetting(setting, str(path), f"nothing may be written into the folder {path}")


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
