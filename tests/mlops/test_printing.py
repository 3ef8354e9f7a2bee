"""Paths, links and commands are printed whole, however narrow the terminal is."""

import io

from rich.console import Console
from rich.table import Table

from mlops.printing import show_findings, show_table, whole
from mlops.tools.params import table_of
from rlhf.params import PretrainParams

PATH = f"/home/someone/{'a-long-folder/' * 6}[a]/:smile:/model.safetensors"
WITH_BLANKS = f"{PATH[:-12]} of a person/model.safetensors"
LINK = f"https://example.org/{'x' * 80}"
COMMAND = f"rm {PATH}; make setup"


def narrow() -> tuple[io.StringIO, Console]:
    printed = io.StringIO()
    return printed, Console(file=printed, width=30, highlight=False, markup=False, emoji=False)


def test_findings() -> None:
    printed, console = narrow()
    show_findings([("[green]ok[/]", "files", WITH_BLANKS, ""),
                   ("STOP", "base model", f"two lines\n{PATH}: is damaged", COMMAND)], console)
    assert printed.getvalue().splitlines() == [f"ok    files       {WITH_BLANKS}", "STOP  base model  two lines",
                                               f"{' ' * 18}{PATH}: is damaged", f"{' ' * 18}→ {COMMAND}"]


def test_a_table_breaks_cells_between_words_only() -> None:
    printed, console = narrow()
    table = Table("name", "what it is", "where", LINK, show_edge=False)
    table.add_row("a", "some prose of several words", PATH, "")
    table.add_row("b", f"see {LINK}", whole(WITH_BLANKS), "")
    show_table(table, console)
    lines = printed.getvalue().splitlines()
    for text, count in ((PATH, 1), (WITH_BLANKS, 1), (LINK, 2)):
        assert sum(text in line for line in lines) == count, text
    assert len(set(map(len, lines))) == 1
    assert "…" not in printed.getvalue()


def test_a_table_that_fits_is_as_before() -> None:
    table = Table("name", "what it is", show_edge=False)
    table.add_row("a", "some prose of several words, which go on on the next line")
    printed, console = narrow()
    console.print(table)
    before = printed.getvalue()
    show_table(table, console)
    assert printed.getvalue() == before * 2


def test_a_parameter_that_is_a_path() -> None:
    printed, console = narrow()
    show_table(table_of("pretrain", PretrainParams, PretrainParams(base_model=WITH_BLANKS), "base_model"), console)
    assert WITH_BLANKS in printed.getvalue()
