"""Time this project against the released algorithm and other libraries, in turn and in one run.

python -m benchmarks                    all rows; writes benchmarks/results.json and benchmarks/RESULTS.md
python -m benchmarks --rows reranking   one row, which replaces its last result
python -m benchmarks --profile          where the time of each row goes, by operation
"""

import argparse
import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.case import Row
from benchmarks.inference_rows import answer_ranking, captioning, image_encoder, reranking, retrieval_evaluation
from benchmarks.measure import BANDWIDTH, RATE, alternate, fastest, machine
from benchmarks.results import shown, table, write_section
from benchmarks.training_rows import captioning_step, pretraining_step
from utils import UserError, allow_tf32, run_command

RESULTS = Path(__file__).parent / "results.json"
COLUMNS = (
    "", "peer", "peer (s)", "ours (s)", "ratio", "torch products", "at least / aim", "difference",
    "floor: GFLOP, GB", "at GFLOP/s, GB/s", "ours / floor", "aim",
)  # fmt: skip
SHOWN = 6  # operations of a profile
NO_GOAL = (0.0, 0.0)  # of a row that this kind of processor does not have
_masked, _padded = (partial(answer_ranking, smooth_padding=padding) for padding in (False, True))
ROWS = {
    "captioning": Row("captioning 2 images, beam 3, 20 tokens", captioning, ((1.6, 1.9), (2.75, 3.2)), 1.3, 5),
    "image_encoder": Row("image encoder, 4 images", image_encoder, ((1.0, 1.0), (1.0, 1.0)), 1.3, 5),
    "reranking": Row("re-ranking one image against 32 texts", reranking, ((6, 7), (11, 13)), 1.3),
    "retrieval": Row(
        "retrieval evaluation, a hundredth of 500 x 2,500, k 64, small", retrieval_evaluation, ((10, 11), (12, 16)), 1.4
    ),
    "vqa": Row("VQA ranking without the ViT", _masked, ((6.5, 8), (12, 16)), 1.8),
    "vqa_padding": Row("the same, smooth_padding", _padded, ((1.8, 2.1), (3.1, 3.4)), 1.25),
    "pretraining": Row("pretraining step, 8 pairs", pretraining_step, ((1.9, 2.1), (2.9, 3.5)), 1.35),
    "captioning_step": Row("captioning step, 4 images", captioning_step, ((1.1, 1.2), (1.7, 2.1)), 1.3),
    "captioning_bf16": Row("captioning in bfloat16", partial(captioning, amp=True), (NO_GOAL, (2, 3)), 1.8, 5, True),
    "pretraining_bf16": Row(
        "pretraining step in bfloat16", partial(pretraining_step, amp=True), (NO_GOAL, (2, 2.5)), 1.8, amp=True
    ),
}


def run_row(row: Row, device: str, **settings: Any) -> dict[str, Any]:
    """Time ours against the fastest peer; raises UserError if not all ways agree."""
    case = row.make(device, **settings)
    difference = case.difference()
    if difference > row.tolerance:
        raise UserError(f"{row.title}: results differ by {difference:.1e}, more than {row.tolerance}")
    peer = fastest(case.peers)
    timing = alternate(case.ours, case.peers[peer], row.repeats, device, torch.bfloat16 if row.amp else torch.float32)
    facts = {"title": row.title, "peer": peer, "goal": row.goal, "floor aim": row.floor_aim, "difference": difference}
    return facts | timing.summary(case.floor, 2 if row.amp else 4)


def cells(found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    return [
        found["title"],
        found["peer"],
        f"{found['theirs (s)']:.3f}",
        f"{found['ours (s)']:.3f}",
        f"**{found['ratio']:.2f}** ({found['lowest ratio']:.2f} to {found['highest ratio']:.2f})",
        f"{found['torch products']:.2f}",
        " / ".join(f"{value:g}" for value in found["goal"]),
        f"{found['difference']:.1e}",
        f"{found['floor (GFLOP)']:.0f}, {found['floor (GB)']:.1f}",
        f"{found[RATE]:.0f}, {found[BANDWIDTH]:.1f}",
        f"{found['times the floor']:.2f}",
        f"{found['floor aim']:g}",
    ]


def save(results: dict[str, dict[str, Any]], device: str) -> None:
    """Write rows to results.json and RESULTS.md; rows that were not run keep their last result."""
    facts, earlier = machine(device), json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    rows = {name: (earlier | results)[name] for name in ROWS if name in earlier | results}
    RESULTS.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    body = f"Machine: {about}.\n\n{table(COLUMNS, map(cells, rows.values()))}"
    write_section("Against the released algorithm and other libraries: `python -m benchmarks`", body)


def profile_row(row: Row, device: str) -> str:
    """Return the costliest operations of a row."""
    ours = row.make(device).ours
    ours()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (device == "cuda")]) as found:
        ours()
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(e, name) / 1e6, e) for e in found.key_averages()), key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    rows = ([e.key, f"{e.count}", f"{time:.3f}", f"{time / total:.0%}"] for time, e in times[:SHOWN])
    operations = table(("operation", "calls", "s", "share"), shown(rows))
    return f"**{row.title}**: {total:.2f} s with the profiler\n\n{operations}\n"


def main() -> None:
    """Run or profile the rows and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (default: all)")
    parser.add_argument("--profile", action="store_true", help="profile the rows instead of timing them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    allow_tf32(False)
    results: dict[str, Any] = {}
    for name in args.rows:
        results[name] = profile_row(ROWS[name], args.device) if args.profile else run_row(ROWS[name], args.device)
        if not args.profile:
            print(*cells(results[name]), sep=" | ", flush=True)
        gc.collect()
    if args.profile:
        write_section("Where the time of a row goes: `python -m benchmarks --profile`", "\n".join(results.values()))
    else:
        save(results, args.device)


if __name__ == "__main__":
    sys.exit(run_command(main))
