"""The two ways a script runs, training or evaluation alone, and the report that ends both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from launch.run import Run
from metrics.units import format_score, put_test_first
from models.precision import autocast
from models.pretrained import refuse_fresh_parts
from report.page import write_report
from training.adapters import apply_adapters
from training.loop import Scores, Task, fit
from training.state import compile_blocks, prepare_model
from utils import UserError, on_main_process

Examples = Callable[[Any, str], list[dict[str, Any]]]  # dataset, split -> what the report shows of it


def splits_of(run: Run, config: Any) -> tuple[str, ...]:
    """Return the splits that a run reads; with `--evaluate` those of the config's `splits` alone."""
    return eval_splits(config) if run.evaluate else ("train", "val", "test")


def eval_splits(config: Any) -> tuple[str, ...]:
    """Return the splits that an evaluation reads; UserError if `splits` names none, or others than val and test."""
    if not config.splits or not set(map(str, config.splits)) <= {"val", "test"}:
        raise UserError(f"splits is {config.splits!r}; expected val, test or both, for instance --set splits=[test]")
    return tuple(split for split in ("val", "test") if split in config.splits)


def on_splits(
    loaders: dict[str, DataLoader], evaluate: Callable[[nn.Module, DataLoader, str], Scores]
) -> Callable[[nn.Module], Scores]:
    """Return the evaluation of a model on every split but train; the name of a split stands before its scores."""

    def evaluate_all(model: nn.Module) -> Scores:
        """Return the scores of all splits."""
        found = {split: evaluate(model, loader, split) for split, loader in loaders.items() if split != "train"}
        return {f"{split}_{name}": value for split, scores in found.items() for name, value in scores.items()}

    return evaluate_all


def train_and_report(
    run: Run, config: Any, model: nn.Module, loaders: dict[str, DataLoader], task: Task, title: str, examples: Examples
) -> None:
    """Train a model, or with `--evaluate` only evaluate it, and write the report with examples of the last split."""
    if run.evaluate:
        scores = evaluate_only(run, config, model, task.evaluate)
    else:
        scores = fit(run, config, model, loaders["train"], task)
    split = [*loaders][-1]
    report_scores(run, title, scores, lambda: examples(loaders[split].dataset, split))


def evaluate_only(run: Run, config: Any, model: nn.Module, evaluate: Callable[[nn.Module], Scores]) -> Scores:
    """Evaluate a model as training would, and append the scores to evaluate.txt."""
    if not config.pretrained:
        run.note("these are scores of random weights: give --set pretrained=... to evaluate a checkpoint")
    if config.get("adapter_weights"):
        apply_adapters(model, config.adapter_weights)  # and the parts trained beside the adapters
    else:
        refuse_fresh_parts(model)
    model = prepare_model(model, config, run.device).eval()
    if config.compile:
        compile_blocks(model)
    with torch.no_grad(), autocast(config.amp, run.device):
        scores = evaluate(model)
    run.log(scores, "evaluate.txt")
    return scores


def report_scores(run: Run, title: str, scores: Scores, cards: Callable[[], list[dict[str, Any]]]) -> None:
    """Print scores, and write the report page with the examples that `cards` returns."""
    scores = put_test_first({name: value for name, value in scores.items() if name != "quality"})
    width = max((len(name) for name in scores), default=0)
    for name, value in scores.items():
        run.print(f"  {name.ljust(width)}  {format_score(name, value)}")
    run.epoch = scores.get("epoch")

    def write() -> str:
        """Write the page and return its path."""
        log = run.read_log("curve.jsonl") + run.read_log()
        return str(write_report(run.output_dir, title, scores, log, cards(), run.notes))

    run.print(f"report: {on_main_process(write)}")
