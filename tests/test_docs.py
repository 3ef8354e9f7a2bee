"""What the documentation points at exists: code, tests, files."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"`((?:rlhf|tasks|flows|tests|bench)/[\w/]+\.py)(?::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


PAGES = [*sorted((REPO / "docs").glob("*.md")), REPO / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_place_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, name in PLACE.findall(text):
        code = REPO / file
        assert code.is_file(), file
        if name:
            assert re.search(rf"(def|class) {name}\b|^\s*{name}:", code.read_text(), re.MULTILINE), f"{file}:{name}"
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target


def test_the_table_of_details_names_code_and_a_test_in_each_row() -> None:
    rows = [line for line in (REPO / "docs" / "details.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        places = [file for file, _ in PLACE.findall(row)]
        assert any(file.startswith("rlhf/") for file in places), row
        assert any(file.startswith("tests/") for file in places), row
