"""Tables without lines, for people and for `grep`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from agora.cli.text import first_line

GAP = "  "


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    right: Collection[str] = (),
) -> None:
    """Prints rows under their headings, one line each; what a terminal has no room for is cut off.

    Args:
        console: Where to.
        columns: The headings.
        rows: As many cells as there are columns.
        right: Headings of columns that are aligned on the right.
    """
    cells = [[c if isinstance(c, Text) else Text(first_line(c)) for c in row] for row in rows]
    table = [[Text(c, style="bold") for c in columns], *cells]
    widths = [max(cell_len(row[n].plain) for row in table) for n in range(len(columns))]
    for row in table:
        line = Text(no_wrap=True, overflow="ellipsis")
        for n, cell in enumerate(row):
            padding = " " * (widths[n] - cell_len(cell.plain))
            last = n == len(row) - 1
            line.append_text(Text(padding) + cell if columns[n] in right else cell if last else cell + Text(padding))
            line.append("" if last else GAP)
        # Into a file or a pipe nothing is cut: other programs read it.
        console.print(line, soft_wrap=not console.is_terminal)
