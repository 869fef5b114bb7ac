"""Writing of RESULTS.md, in which each benchmark owns a section."""

from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = "# Measured\n\nEach section is the last output of its command. Ratios hold within a run; seconds do not."


def write_section(title: str, body: str) -> None:
    """Replace the section of that title, or add it at the end."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else TITLE
    head, *sections = text.split("\n## ")
    kept = [section.strip("\n") for section in sections]
    new = f"{title}\n\n{body.strip()}"
    places = [n for n, section in enumerate(kept) if section.split("\n", 1)[0] == title]
    if places:
        kept[places[0]] = new
    else:
        kept.append(new)
    RESULTS.write_text("\n\n## ".join([head.strip("\n"), *kept]) + "\n", encoding="utf-8")


def fill(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between its marks <!-- name --> and <!-- /name -->."""
    head, rest = text.split(f"<!-- {name} -->", 1)
    _, tail = rest.split(f"<!-- /{name} -->", 1)
    return f"{head}<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->{tail}"
