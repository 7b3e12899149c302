"""Plain text tables for `print(plan)` and `print(summary)`, where no terminal library is at hand."""

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns padded to their widest cell; those whose header stands in `right` (space-separated) align right.

    >>> print(table(["path", "size"], [["a", "1"], ["bc", "10"]], right="size"))
    path  size
    ────  ────
    a        1
    bc      10
    """
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    to_right = [header in right.split() for header in headers]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, to_right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("─" * w for w in widths), *map(line, rows)])


def count(n: int, noun: str) -> str:
    """A number with its noun: `1 layer`, `1,400 layers`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size(n: int) -> str:
    """Bytes for people: `1.5 MB` is 1,500,000 of them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} B"
