"""Markdown tables, and the pages in which each benchmark owns a part."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Measured\n\nEach section is the last output of its command. Ratios hold within a run; seconds do not."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def shown(rows: Iterable[list[str]]) -> Iterator[list[str]]:
    """Yield the rows of a table, and print each as it comes."""
    for row in rows:
        print(*row, sep=" | ", flush=True)
        yield row


def write_section(title: str, body: str) -> None:
    """Replace the section of that title, or add it at the end."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else TITLE
    head, *sections = (section.strip("\n") for section in text.split("\n## "))
    by_title = {section.split("\n", 1)[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{body.strip()}"
    RESULTS.write_text("\n\n## ".join((head, *by_title.values())) + "\n", encoding="utf-8")


def fill(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between its marks <!-- name --> and <!-- /name -->."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n\n{body}\n\n{end}", text, flags=re.DOTALL)
