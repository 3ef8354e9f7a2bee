"""Follows what a run prints and what its pages link: every path and every link must be there."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

FOLDERS = "build|data|docs|infra|inputs|metrics|mlartifacts|models|profiles|raw|reports|scratch"
# A path from the root, from a folder above, or below one of the checkout's folders; not a part of a longer word.
PATH = re.compile(rf"(?<![\w:/.~$<#-])((?:\.\.)?/[\w.@=,+-]+(?:/[\w.@=,+-]+)*|(?:{FOLDERS})/[\w./@=,+-]+)")
LINK = re.compile(r"""(?:href|src)\s*=\s*["']([^"'#?]+)[^"']*["']""")


def paths_in(text: str) -> list[str]:
    """The paths that a text names, in their order; what ends a sentence is no part of them."""
    return list(dict.fromkeys(found.rstrip(".,=") for found in PATH.findall(text)))


def missing_paths(text: str, *folders: Path) -> list[str]:
    """Those that are not there, seen from any of the folders."""
    return [path for path in paths_in(text) if not any((folder / path).exists() for folder in folders)]


def missing_links(page: Path) -> list[str]:
    """The links of a page of HTML, and of those that it leads to in its own folder, to files that are not there."""
    return [f"{found.relative_to(page.parent)}: {target}" for found in _pages(page)
            for target in LINK.findall(found.read_text(encoding="utf-8"))
            if "://" not in target and not target.startswith(("data:", "mailto:", "javascript:"))
            and not (found.parent / unquote(target)).exists()]


def _pages(page: Path) -> Iterator[Path]:
    waiting, seen = [page], {page}
    while waiting:
        current = waiting.pop()
        yield current
        for target in LINK.findall(current.read_text(encoding="utf-8")):
            found = (current.parent / unquote(target)).resolve() if "://" not in target else current
            if found.suffix == ".html" and found.is_file() and found not in seen:
                seen.add(found)
                waiting.append(found)
