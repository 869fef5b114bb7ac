"""The bootstrapped set: finished shards merged into lists, counted, and shown in a report (section 3.3)."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bootstrap.shards import Row, Shards, write_rows
from files import write_whole

BINS = 20  # of the histogram of probabilities
SHOWN = 24  # images of the report


@dataclass
class Tally:
    """Counts over all rows, added one shard at a time, in memory that does not grow."""

    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    unreadable: int = 0
    histograms: dict[str, list[int]] = field(default_factory=dict)
    num_words: Counter = field(default_factory=Counter)
    words: dict[str, "Distinct"] = field(default_factory=lambda: defaultdict(lambda: Distinct(1 << 22)))
    texts: dict[str, "Distinct"] = field(default_factory=lambda: defaultdict(Distinct))
    same: int = 0
    shared_words: float = 0.0
    compared: int = 0
    shown: list[list[Row]] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        """Count the rows of a shard."""
        by_image: dict[str, list[Row]] = {}
        words: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if "error" in row:
                self.unreadable += 1
                continue
            source = row["source"]
            (self.kept if row["kept"] else self.dropped)[source] += 1
            if "probability" in row:
                counts = self.histograms.setdefault(source, [0] * BINS)
                counts[min(int(row["probability"] * BINS), BINS - 1)] += 1
            own = row["caption"].lower().split()
            self.num_words[source] += len(own)
            words[source].update(own)
            self.texts[source].add(row["caption"])
            by_image.setdefault(row["image"], []).append(row)
        for source, found in words.items():
            for word in found:
                self.words[source].add(word)
        for group in by_image.values():
            self.compare(group)
            if len(self.shown) < SHOWN:
                self.shown.append(group)

    def compare(self, rows: Sequence[Row]) -> None:
        """Count the words of an image's synthetic texts that its web texts have too."""
        web = [row["caption"].lower() for row in rows if row["source"] == "web"]
        known = {word for text in web for word in text.split()}
        for text in (row["caption"].lower() for row in rows if row["source"] == "synthetic"):
            words = set(text.split())
            self.same += text in web
            self.shared_words += len(words & known) / max(len(words | known), 1)
            self.compared += 1

    def scores(self) -> dict[str, dict[str, float]]:
        """Return counts, shares and diversity by source."""
        found = {}
        for source in sorted(set(self.kept) | set(self.dropped), reverse=True):
            kept, total = self.kept[source], self.kept[source] + self.dropped[source]
            found[source] = {
                "texts": total,
                "kept": kept,
                "kept (%)": 100 * kept / total,
                "distinct texts": self.texts[source].count(),
                "distinct words": self.words[source].count(),
                "words a text": self.num_words[source] / total,
            }
        if self.compared:
            found["synthetic"] |= {
                "words no web text has": self.words["synthetic"].count_beyond(self.words["web"]),
                "equal to the web text (%)": 100 * self.same / self.compared,
                "words shared with it (%)": 100 * self.shared_words / self.compared,
            }
        return found


class Distinct:
    """Counts distinct texts in `size` bytes however many: exact for few, within a per cent up to ten times `size`."""

    def __init__(self, size: int = 1 << 24):
        self.seen = np.zeros(size, bool)

    def add(self, text: str) -> None:
        """Count a text."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self.seen[int.from_bytes(digest, "big") % len(self.seen)] = True

    def count(self) -> int:
        """Return the number of distinct texts, by linear counting (Whang et al., 1990)."""
        return _linear_count(self.seen)

    def count_beyond(self, other: "Distinct") -> int:
        """Return the number of distinct texts that `other` has not."""
        return _linear_count(self.seen | other.seen) - other.count()


def _linear_count(seen: np.ndarray) -> int:
    share = min(seen.mean(), 1 - 1 / len(seen))
    return round(-len(seen) * math.log1p(-share))


def merge_shards(shards: Shards, folder: Path) -> Tally:
    """Write bootstrapped.jsonl, dropped.jsonl and unreadable.jsonl from the finished shards, and count them.

    For tar files there is no bootstrapped.jsonl, since the bootstrapped tar files hold the same pairs.

    Raises:
        UserError: they could not be written.
    """
    tally, names = Tally(), ("dropped", "unreadable") if shards.tars else ("bootstrapped", "dropped", "unreadable")
    with ExitStack() as stack:
        files = {name: stack.enter_context(write_whole(folder / f"{name}.jsonl")) for name in names}
        for shard in range(len(shards)):
            rows = shards.rows(shard)
            tally.add(rows)
            for row in rows:
                name = "unreadable" if "error" in row else "bootstrapped" if row["kept"] else "dropped"
                if name in files:
                    write_rows(files[name], [{key: value for key, value in row.items() if key != "kept"}])
    return tally


def cards(tally: Tally, images: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the first images with their texts as the report shows them: kept texts good, dropped ones bad.

    Args:
        tally: of the finished shards.
        images: name -> image, as far as they can be shown.
    """

    def line(row: Row) -> tuple[str, str, str]:
        """Return label, text and tone."""
        return f"{row['source']} {row.get('probability', '')}", row["caption"], "good" if row["kept"] else "bad"

    found = [(rows[0]["image"], rows) for rows in tally.shown]
    return [{"image": images[name], "lines": [*map(line, rows)]} for name, rows in found if name in images]
