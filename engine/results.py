"""Result files, scores on the screen, and the report page that every script ends with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.adapters import apply_adapters
from engine.loop import autocast, compile_blocks, prepare_model
from engine.report import write_report
from engine.run import Run
from files import why_not_written, write_whole
from utils import UserError, on_main_process


def write_json(path: Path, content: Any) -> Path:
    """Write a result file.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(why_not_written(path, error)) from None
    text = json.dumps(content, ensure_ascii=False)
    with write_whole(path) as file:
        # halves of characters, which annotations may hold, cannot be written as they are
        file.write(text if _is_whole(text) else json.dumps(content))
    return path


def _is_whole(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_json(path: Path) -> Any:
    """Read a result file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def evaluate_only(run: Run, config: Any, model: nn.Module, evaluate: Callable[[nn.Module], dict]) -> dict[str, Any]:
    """Evaluate a model as training would, and append the scores to evaluate.txt."""
    if not config.pretrained:
        run.note("these are scores of random weights: give --set pretrained=... to evaluate a checkpoint")
    if config.get("adapter_weights"):
        apply_adapters(model, config.adapter_weights)
    model = prepare_model(model, config, run).eval()
    if config.compile:
        compile_blocks(model)
    with torch.no_grad(), autocast(config, run.device):
        scores = evaluate(model)
    run.log(scores, "evaluate.txt")
    return scores


def finish(run: Run, title: str, scores: dict[str, Any], pictures: Callable[[], list[dict[str, Any]]]) -> None:
    """Print the scores and write the report page."""
    scores = {name: value for name, value in scores.items() if name != "quality"}
    width = max((len(name) for name in scores), default=0)
    for name, value in scores.items():
        run.print(f"  {name.ljust(width)}  {value:.4g}")
    run.epoch = scores.get("epoch")
    page = on_main_process(lambda: _report(run, title, scores, pictures()))
    run.print(f"report: {page}")


def _report(run: Run, title: str, scores: dict[str, Any], pictures: list[dict[str, Any]]) -> str:
    log = run.read_log("curve.jsonl") + run.read_log()
    return str(write_report(run.output_dir, title, scores, log, pictures, run.notes))
