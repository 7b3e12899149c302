"""Reports of a benchmark: `terminal`, `markdown` and `html`, each from the one document that `peftkit bench` writes."""

from peftkit.bench.report.page import html
from peftkit.bench.report.text import markdown, terminal

__all__ = ["html", "markdown", "terminal"]
