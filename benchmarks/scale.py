"""A plan of pretraining on 8 to 512 GPUs, checked on this machine: python -m benchmarks.scale

Memory, bytes moved and operations are counted on the model; rates of GPUs and links are assumed (`CLUSTERS` and the
constants below). Fills the marked parts of docs/scale.md.

python -m benchmarks.scale            measures the check first (under a minute), and keeps it in docs/scale.json
python -m benchmarks.scale --tables   from the figures in docs/scale.json
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import floor
from benchmarks.memory import CASES
from benchmarks.scale_check import check
from benchmarks.scale_counts import WIDTH, Counts, count
from models.med import MedConfig
from models.vit import VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
GPUS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8  # GPUs of a machine
GLOBAL_BATCH, LOCAL_BATCH = 2400, 75  # of the released configuration: 32 GPUs
SETS = {"14M": 14e6, "129M": 129e6}
MODELS = ("base", "large")
EPOCHS = 20

# Assumed, not measured.
MFU = 0.35  # share of the peak rate that the counted operations reach while a GPU computes
LINK_SHARE = 0.7  # share of a link's rate that a collective reaches
LATENCY = 5e-6  # seconds of a hop of a collective
BUCKET = 25 * 2**20  # bytes that DDP sends at once
OVERLAP = 0.8  # share of the backward pass during which DDP's sums can run beside it
LAUNCH = 6e-6  # seconds in which PyTorch starts an operation, without compile or CUDA graphs
FEATURES = 256  # width of a queue's feature

# CapFilt.
IMAGES, IMAGE_TOKENS, TEXT_TOKENS, NEW_TOKENS, TEXTS = 64, 577, 16, 15, 2
OPERATIONS = 30  # that a layer starts for a token of a caption: assumed


@dataclass(frozen=True)
class Cluster:
    """GPUs by data sheet: GFLOP/s in bfloat16, GB/s of memory, of a GPU's links, of a node's network."""

    name: str
    rate: float
    memory: float
    links: float
    network: float

    def bus(self, gpus: int) -> float:
        """GB/s at which a ring over all GPUs passes bytes on: the slowest link that it crosses."""
        return LINK_SHARE * (self.links if gpus <= NODE else min(self.links, self.network))


CLUSTERS = (
    Cluster("H100, 8 x 400 Gb/s a node", 989e3, 3350, 450, 400),
    Cluster("A100, 8 x 200 Gb/s a node", 312e3, 2039, 300, 200),
    Cluster("A100, 100 Gb/s a node", 312e3, 2039, 300, 12.5),
)


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts on one GPU; `sums` is all of the all-reduce, `exposed` what nothing hides."""

    pairs: float
    gpus: int
    compute: float
    launches: float
    update: float
    sums: float
    exposed: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.compute, self.launches) + self.update + self.exposed

    @property
    def rate(self) -> float:
        """Pairs a second of all GPUs."""
        return self.pairs * self.gpus / self.seconds


# Arithmetic.


def memory(counts: Counts, gpus: int, sharded: bool) -> dict[str, float]:
    """Return GB of a GPU by part, without what pairs need."""
    share = gpus if sharded else 1
    trained = counts.trained * WIDTH / share
    parts = {
        "parameters": trained,
        "gradients": trained,
        "buckets / gathered": counts.together * WIDTH if sharded else trained,  # DDP sums copies of the gradients
        "AdamW moments": 2 * trained,
        "momentum twin": counts.twin * WIDTH / share,
        "queues": counts.queues,
        "bf16 weights, queue copies": counts.step_bytes,
    }
    return {name: value / 1e9 for name, value in parts.items()}


def traffic(counts: Counts, gpus: int, pairs: float) -> dict[str, float]:
    """Return GB that each GPU sends in a step, by kind."""
    share = (gpus - 1) / gpus / 1e9 * WIDTH
    return {
        "DDP: all-reduce of gradients": 2 * share * counts.trained,
        "fsdp: all-gather of parameters": share * counts.gathered,
        "fsdp: reduce-scatter of gradients": share * counts.scattered,
        "features for the queues": 2 * FEATURES * pairs * (gpus - 1) * WIDTH / 1e9,
    }


def all_reduce_seconds(num_bytes: float, gpus: int, cluster: Cluster) -> float:
    """Return the time of a ring's bytes and, for each bucket, of a tree's hops."""
    if gpus == 1:
        return 0.0
    hops = math.ceil(num_bytes / BUCKET) * 2 * math.log2(gpus) * LATENCY
    return 2 * (gpus - 1) / gpus * num_bytes / (cluster.bus(gpus) * 1e9) + hops


def step(counts: Counts, gpus: int, pairs: float, cluster: Cluster) -> Step:
    """Return a step of DDP with `pairs` pairs a GPU."""
    compute = pairs * counts.gflop / (cluster.rate * MFU)
    launches = counts.kernels * LAUNCH
    num_bytes = WIDTH * counts.trained
    # AdamW reads four tensors and writes three, the twin's step reads two and writes one
    update = WIDTH * (7 * counts.trained + 3 * counts.twin) / (cluster.memory * 1e9)
    sums = all_reduce_seconds(num_bytes, gpus, cluster)
    hidden = OVERLAP * 2 / 3 * max(compute, launches)
    exposed = max(sums - hidden, sums * min(BUCKET / num_bytes, 1.0))  # the last bucket waits for the whole pass
    features = traffic(counts, gpus, pairs)["features for the queues"] / cluster.bus(gpus)
    return Step(pairs, gpus, compute, launches, update, sums, exposed + features)


def hours(pairs: float, rate: float) -> float:
    """Return the hours of all epochs at a rate of pairs a second."""
    return pairs * EPOCHS / rate / 3600


def steps(counts: Counts, cluster: Cluster, whole_batch: bool) -> list[Step]:
    """Return the step of each number of GPUs, with the global batch as released or the local one."""
    return [step(counts, n, GLOBAL_BATCH / n if whole_batch else LOCAL_BATCH, cluster) for n in GPUS]


def last_efficient(counts: Counts, cluster: Cluster, whole_batch: bool, least: float = 0.8) -> int:
    """Return the most GPUs at which each does `least` of what each of 8 does."""
    found = steps(counts, cluster, whole_batch)
    return max(s.gpus for s in found if s.rate / s.gpus >= least * found[0].rate / found[0].gpus)


def capfilt(vit: str, cluster: Cluster) -> dict[str, float]:
    """Return seconds a batch of CapFilt's parts: both ViTs, a caption by sampling, two matches a image."""
    sizes = VARIANTS[vit]
    text = MedConfig(encoder_width=sizes["embed_dim"])
    image = floor.vit(IMAGE_TOKENS, sizes["embed_dim"], sizes["depth"], sizes["patch_size"])
    rate = cluster.rate * MFU
    token = floor.text(1, text, IMAGE_TOKENS, TEXT_TOKENS) + floor.head(1, text)
    read = 2 * IMAGES * text.num_hidden_layers * IMAGE_TOKENS * text.hidden_size  # keys and values
    read += 1e9 * (floor.text_weights(text, True) + floor.head_weights(text))
    one = max(IMAGES * token / rate, 2 * read / 1e9 / cluster.memory, OPERATIONS * text.num_hidden_layers * LAUNCH)
    return {
        "images": 2 * IMAGES * (image + floor.projection(IMAGE_TOKENS, text)) / rate,
        "captions": NEW_TOKENS * one,
        "matches": TEXTS * IMAGES * floor.text(TEXT_TOKENS, text, IMAGE_TOKENS) / rate,
    }


# Tables.


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def parts_table(first: str, columns: dict[str, dict[str, float]], digits: int) -> str:
    """Return a table with a row for each part and a column for each case."""
    parts = next(iter(columns.values()))
    rows = [[part, *(f"{column[part]:.{digits}f}" for column in columns.values())] for part in parts]
    return table([first, *columns], rows)


def memory_table() -> str:
    """Parts by model and way."""
    ways = {"DDP": (8, False), "fsdp 8": (8, True), "fsdp 64": (64, True)}
    columns = {f"{vit}, {way}": memory(count(vit), *kind) for vit in MODELS for way, kind in ways.items()}
    sums = {name: column | {"together": sum(column.values())} for name, column in columns.items()}
    return parts_table("GB", sums, 2)


def pair_table() -> str:
    """Bytes of a pair, and the largest batch of 80 GB, of which a tenth is left free."""
    rows = []
    for name, kind in CASES.items():
        found = [count(vit, *kind) for vit in MODELS]
        most = [(72 - sum(memory(c, 8, False).values())) * 1e9 / c.pair_bytes for c in found]
        rows.append([name, *(f"{c.pair_bytes / 1e6:.0f} MB, {int(n)}" for c, n in zip(found, most))])
    return table(["checkpointing of", "base: a pair, pairs in 80 GB", "large"], rows)


def traffic_table() -> str:
    """Bytes that a GPU sends a step, at the released pairs a GPU."""
    cases = [(vit, gpus) for vit in MODELS for gpus in (8, 64, 512)]
    return parts_table("GB", {f"{vit}, {n} GPUs": traffic(count(vit), n, LOCAL_BATCH) for vit, n in cases}, 3)


def training_table(vit: str, cluster: Cluster, whole_batch: bool, decoded: float) -> str:
    """Steps and pairs a second, hours, cores."""
    rows = []
    for s in steps(count(vit), cluster, whole_batch):
        parts = (s.compute, s.launches, s.update, s.sums, s.exposed, s.seconds)
        times = [f"{hours(pairs, s.rate):,.0f}" for pairs in SETS.values()]
        row = [s.gpus, f"{s.pairs:g}", *(f"{1000 * x:.0f}" for x in parts), f"{1 / s.seconds:.2f}", f"{s.rate:,.0f}"]
        rows.append([*row, *times, f"{s.rate / s.gpus / decoded:.0f}"])
    parts = ["compute ms", "launches ms", "update ms", "all-reduce ms", "exposed ms", "step ms"]
    head = ["GPUs", "pairs a GPU", *parts, "steps/s", "pairs/s", *(f"{name}, h" for name in SETS), "cores a GPU"]
    kind = f"{GLOBAL_BATCH:,} pairs a step" if whole_batch else f"{LOCAL_BATCH} pairs a GPU"
    return f"**{vit}, {cluster.name}, {kind}**\n\n{table(head, rows)}"


def limits_table() -> str:
    """Where a GPU does less than 80% of what it does among 8."""
    cases = [(vit, whole) for vit in MODELS for whole in (True, False)]
    rows = [[c.name, *(last_efficient(count(vit), c, whole) for vit, whole in cases)] for c in CLUSTERS]
    head = [f"{vit}, {GLOBAL_BATCH:,} a step" if whole else f"{vit}, {LOCAL_BATCH} a GPU" for vit, whole in cases]
    return table(["GPUs at most", *head], rows)


def capfilt_table(decoded: float) -> str:
    """Images a second of a GPU, hours of the sets, cores that keep a GPU busy."""
    rows = []
    for vit in MODELS:
        for cluster in (CLUSTERS[0], CLUSTERS[1]):
            parts = capfilt(vit, cluster)
            rate = IMAGES / sum(parts.values())
            times = [f"{pairs / rate / gpus / 3600:,.1f}" for pairs in SETS.values() for gpus in (8, 64)]
            shown = [f"{1000 * x:.0f}" for x in parts.values()]
            name = f"{vit}, {cluster.name.split(',')[0]}"
            rows.append([name, *shown, f"{rate:,.0f}", *times, f"{rate / decoded:.0f}"])
    sizes = [f"{name} on {gpus}, h" for name in SETS for gpus in (8, 64)]
    parts = [f"{name} ms" for name in ("images", "captions", "matches")]
    return table([f"{IMAGES} images", *parts, "images/s a GPU", *sizes, "cores a GPU"], rows)


def check_table(found: dict[str, float]) -> str:
    """The prediction beside what was measured, and its inputs."""
    return table(["", "value"], [[name, f"{value:.3g}"] for name, value in found.items()])


def tables(found: dict[str, float]) -> dict[str, str]:
    """Return every marked part of docs/scale.md."""
    decoded = found["images/s a core, 224 px"]
    cases = [(vit, cluster, whole) for vit in MODELS for cluster in CLUSTERS for whole in (True, False)]
    return {
        "memory": memory_table(),
        "pairs": pair_table(),
        "traffic": traffic_table(),
        "training": "\n\n".join(training_table(*case, decoded) for case in cases),
        "limits": limits_table(),
        "capfilt": capfilt_table(found["images/s a core, 384 px"]),
        "check": check_table(found),
    }


def fill(text: str, name: str, body: str) -> str:
    """Replace what stands between <!-- name --> and <!-- /name -->."""
    head, rest = text.split(f"<!-- {name} -->", 1)
    _, tail = rest.split(f"<!-- /{name} -->", 1)
    return f"{head}<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->{tail}"


def main() -> int:
    """Check, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="do not measure; take docs/scale.json")
    if not parser.parse_args().tables:
        (DOCS / "scale.json").write_text(json.dumps(check(), indent=1) + "\n", encoding="utf-8")
    found = json.loads((DOCS / "scale.json").read_text(encoding="utf-8"))
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    for name, body in tables(found).items():
        text = fill(text, name, body)
    (DOCS / "scale.md").write_text(text, encoding="utf-8")
    print(check_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
