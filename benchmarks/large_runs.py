"""Memory, bytes and operations of a pretraining step, counted on the model: python -m benchmarks.large_runs

Runs forward passes on tensors without storage and fills the tables of docs/large_runs.md. Rates of GPUs are assumed:
15% to 45% of the peak, the range that published training runs report.
"""

import itertools
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from benchmarks.case import word_texts
from benchmarks.results import fill, shown, table
from benchmarks.training_rows import build_pretraining, pretraining_floor
from models.blip_pretrain import BLIP_Pretrain
from utils import run_command

PAGE = Path(__file__).parent.parent / "docs" / "large_runs.md"
CAPTION = max(word_texts(75), key=lambda text: len(text.split()))  # a batch is padded to its longest text
CASES = {"none": (False, False), "image": (True, False), "text": (False, True), "image and text": (True, True)}
BATCHES = (8, 16)  # pairs of two passes; their difference gives the bytes of a pair
PEAKS = {"A100": 312e3, "H100": 989e3}  # GFLOP/s in bfloat16, dense, by data sheet
UTILISATION = (0.15, 0.45)
SIZES, EPOCHS, GPUS = {"14M": 14e6, "129M": 129e6}, 20, (8, 64)
GFLOP = "operations of a pair, GFLOP"
MEMORY = 72e9  # bytes of an 80 GB GPU, a tenth left free


def forward_bytes(model: BLIP_Pretrain, pairs: int) -> int:
    """Return the bytes that a forward pass in bfloat16 keeps for the backward pass."""
    kept, tensors = {}, []
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        named = [*model.named_parameters(), *model.named_buffers()]
        state = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for n, t in named}
        weights = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            """Note the bytes of a tensor that is kept."""
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
                tensors.append(tensor)  # keeps the storage's address from being used again
            return tensor

        image = torch.randn(pairs, 3, *model.visual_encoder.patch_embed.img_size)
        keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keeping, patch("models.attention.FEW_QUERIES", 0):  # the path that a GPU takes
            functional_call(model, state, (image, [CAPTION] * pairs, 0.4))
    return sum(kept.values())


def kept_bytes(vit: Any, case: str, **settings: Any) -> tuple[float, float]:
    """Return the bytes kept for each pair, and those kept for any batch; `case` names what is recomputed."""
    # without dropout of attention: with it a CPU keeps the attention, which a GPU's kernels recompute
    text = {**settings.pop("med_config", {}), "attention_probs_dropout_prob": 0.0}
    with torch.device("meta"):
        models = [build_pretraining(*CASES[case], vit=vit, med_config=text, **settings) for _ in BATCHES]
    few, many = (forward_bytes(model, pairs) for model, pairs in zip(models, BATCHES, strict=True))
    pair = (many - few) / (BATCHES[1] - BATCHES[0])
    return pair, few - BATCHES[0] * pair


def counts(vit: Any, **settings: Any) -> dict[str, float]:
    """Return the counts of one model by name, in the units that the names give."""
    with torch.device("meta"):
        model = build_pretraining(False, False, vit=vit, **settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    momentum = sum(p.numel() for p in model.parameters()) - trained
    queues = model.image_queue.numel() + model.text_queue.numel()
    pairs = {case: kept_bytes(vit, case, **settings) for case in CASES}
    fixed = pairs["none"][1] + 4 * queues
    ddp = 4 * (5 * trained + momentum) + fixed  # parameters, gradients, their buckets, two moments of AdamW
    return {
        "parameters trained, millions": trained / 1e6,
        "parameters of the momentum encoders, millions": momentum / 1e6,
        GFLOP: sum(part.gflop for part in pretraining_floor(model, [CAPTION] * 8)) / 8,
        **{f"bytes of a pair, recomputing {case}, MB": pair / 1e6 for case, (pair, _) in pairs.items()},
        "queues, their copies and bfloat16 weights, GB": fixed / 1e9,
        "memory under DDP without pairs, GB": ddp / 1e9,
        "memory under fsdp on 8 GPUs without pairs, GB": (4 * (4 * trained + momentum) / 8 + fixed) / 1e9,
        "pairs that fit an 80 GB GPU under DDP": (MEMORY - ddp) // pairs["none"][0],
        "bytes that a GPU of 8 sends under DDP, GB": 2 * 7 / 8 * 4 * trained / 1e9,
    }


def hours_table(columns: dict[str, dict[str, float]]) -> str:
    """Return pairs per second of a GPU and the hours of pretraining, as ranges."""
    head = ["", "pairs/s of a GPU", *(f"{size} on {gpus}, h" for size in SIZES for gpus in GPUS)]
    rows = []
    for (vit, column), (name, peak) in itertools.product(columns.items(), PEAKS.items()):
        low, high = (share * peak / column[GFLOP] for share in UTILISATION)
        row = [f"{vit}, {name}", f"{low:,.0f} to {high:,.0f}"]
        for size, gpus in itertools.product(SIZES.values(), GPUS):
            row.append(" to ".join(f"{size * EPOCHS / rate / gpus / 3600:,.0f}" for rate in (high, low)))
        rows.append(row)
    return table(head, shown(rows))


def main() -> None:
    """Count, print and write the tables."""
    columns = {vit: counts(vit) for vit in ("base", "large")}
    rows = [[name, *(f"{column[name]:,.3g}" for column in columns.values())] for name in columns["base"]]
    body = table(["", *columns], shown(rows)) + "\n\n" + hours_table(columns)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "counts", body), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
