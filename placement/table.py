"""Text tables, as the dry run and refusals print them."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]], limit: int | None = None) -> str:
    """Columns padded to their widest cell, the header underlined. Beyond ``limit`` rows only their number is given."""
    shown = [[str(cell) for cell in row] for row in rows[:limit]]
    lines = [list(header), ["-" * max(map(len, column)) for column in zip(header, *shown, strict=True)], *shown]
    widths = [len(cell) for cell in lines[1]]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(rows) > len(shown):
        text.append(f"... and {len(rows) - len(shown)} more")
    return "\n".join(text)
