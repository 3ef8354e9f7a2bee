"""Prints tables and findings whose paths, links and commands stay whole, to be copied, whatever the width.

Rich cuts or breaks a word that is longer than its column. Here a line is then longer than the terminal, which wraps it.
"""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

ANY_WIDTH = 1_000_000


def terminal() -> Console:
    """Standard output, for texts as they are: `[a]` and `:a:` in a path are no style and no emoji."""
    return Console(highlight=False, markup=False, emoji=False)


def whole(text: str) -> Text:
    """A cell that stays on one line, blanks and all."""
    return Text(text, no_wrap=True)


def show_table(table: Table, console: Console) -> None:
    """Breaks cells between words only: the widest columns get narrower until the table fits, none than its longest
    word."""
    cells = [[column.header, *column.cells] for column in table.columns]
    widths = [max(_size(cell, console).maximum for cell in column) for column in cells]
    needed = [width if column.no_wrap else max(_size(cell, console).minimum for cell in texts)
              for width, column, texts in zip(widths, table.columns, cells, strict=True)]
    over = _size(table, console).maximum - console.width
    while over > 0 and (able := [place for place, width in enumerate(widths) if width > needed[place]]):
        widths[max(reversed(able), key=lambda place: widths[place])] -= 1
        over -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.min_width = column.max_width = width
    console.print(table, crop=False)


def _size(item: RenderableType, console: Console) -> Measurement:
    """Its columns, at least and at most, on a terminal that is wide enough."""
    size = Measurement.get(console, console.options.update(max_width=ANY_WIDTH), item)
    return Measurement(size.maximum, size.maximum) if isinstance(item, Text) and item.no_wrap else size


def show_findings(findings: Iterable[tuple[str, str, str, str]], console: Console) -> None:
    """(mark, what was looked at, what was found, what to change) as lines; the mark has rich's markup."""
    rows = [(Text.from_markup(mark), what, found, change) for mark, what, found, change in findings]
    marks = max((len(mark) for mark, *_ in rows), default=0)
    names = max((len(what) for _, what, *_ in rows), default=0)
    indent = " " * (marks + names + 4)
    for mark, what, found, change in rows:
        head = Text.assemble(mark, " " * (marks - len(mark) + 2), what.ljust(names + 2))
        console.print(head + found.replace("\n", f"\n{indent}"), soft_wrap=True)
        if change:
            console.print(Text(f"{indent}→ {change}"), soft_wrap=True)
