"""What the site makes of these pages, for `mkdocs.yml`: pages from above this folder, and links that lead out of it."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_FROM_ABOVE = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in what is in the repository's root for those who look there."""
    for source, name in _FROM_ABOVE.items():
        files.append(File.generated(config, name, content=_moved((_ROOT / source).read_text())))
    return files


def _moved(text: str) -> str:
    """As if it had been written in this folder."""
    return _LINK.sub(lambda found: f"[{found[1]}]({_seen_from_here(found[2])})", text)


def _seen_from_here(target: str) -> str:
    if re.match(r"[a-z]+:|#", target):
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - as mkdocs calls it
    """Links to the source become the names of its files: the site has pages alone."""
    here = Path(config.docs_dir, page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        name, _, anchor = target.partition("#")
        path = (here / name).resolve()
        if path.is_relative_to(config.docs_dir):
            return found[0]
        above = _FROM_ABOVE.get(str(path.relative_to(_ROOT)))
        if above is not None:
            back = "../" * len(Path(page.file.src_uri).parent.parts)
            return f"[{text}]({back}{above}{'#' if anchor else ''}{anchor})"
        return f"{text} (`{path.relative_to(_ROOT)}`)"

    return _LINK.sub(link, markdown)
