"""Pretrain BLIP by contrast, matching and language modelling (paper sections 3.2 and 4.1)."""

from launch.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
from functools import partial
from typing import Any

from torch import nn

from data import make_loaders
from files import append
from launch.config import PretrainConfig
from launch.run import Run, launch
from models.blip_pretrain import BLIP_Pretrain, blip_pretrain
from models.momentum import TEMPERATURE_RANGE, Candidates, copy_params
from models.pretrained import DEIT_URL, VIT_IN21K, load_bert, load_vit
from training.contrast import compute_candidates
from training.loop import Losses, Task, fit
from training.optimizer import step_lr, warmup_lr
from training.progress import Progress
from training.results import report_scores
from utils import UserError, all_gather_object, get_rank

EXAMPLES = (
    "python pretrain.py --config configs/miniature/pretrain.yaml --output_dir output/pretrain",
    "python -m torch.distributed.run --nproc_per_node=8 pretrain.py --config configs/pretrain.yaml",
)
ALPHA_EPOCHS = 2  # the momentum model's share of the targets grows over this many epochs
CHANCE_ITM = 0.6365  # matching loss of a model that ignores the image: entropy of one match among three pairs
STUCK_STEPS = 1000


def schedule(config: PretrainConfig, progress: Progress) -> float:
    """Linear warm-up in the first epoch, then a lower rate every epoch."""
    if progress.epoch == 0:
        return warmup_lr(progress.step, config.warmup_steps, config.warmup_lr, config.init_lr)
    return step_lr(progress.epoch, config.init_lr, config.min_lr, config.lr_decay_rate)


class BadImages:
    """Counts the unreadable images of this process, also over continued runs, and lists them in the run's folder."""

    def __init__(self, limit: int, run: Run):
        self.limit, self.found = limit, set[str]()
        self.path = run.output_dir / f"bad_images_rank{run.rank}.txt"
        if run.resume and self.path.is_file():
            self.found = set(self.path.read_text(encoding="utf-8").splitlines())
        else:
            self.path.unlink(missing_ok=True)  # an earlier run's

    def inspect(self, batch: dict[str, Any]) -> str:
        """List batch["bad"], lines of "path: reason"; return why the run has to end, "" if it goes on."""
        new = {line for text in batch["bad"] for line in text.splitlines()} - self.found
        if new:
            self.found |= new
            append(self.path, "".join(f"{line}\n" for line in sorted(new)))
        if len(self.found) <= self.limit:
            return ""
        return (
            f"rank {get_rank()}: {len(self.found)} images cannot be read, more than max_bad_images {self.limit}; "
            f"they are listed in {self.path}"
        )

    def count(self, _: nn.Module) -> dict[str, float]:
        """Return the number over all processes, as a score."""
        return {"bad_images": sum(all_gather_object(len(self.found)))}


def train_step(
    model: nn.Module, batch: dict[str, Any], progress: Progress, candidates: Candidates | None = None, *, alpha: float
) -> Losses:
    """Contrastive, matching and LM losses of pairs; the weight `alpha` of momentum targets grows over ALPHA_EPOCHS."""
    alpha *= min(1.0, progress.epoch_fraction / ALPHA_EPOCHS)
    loss_itc, loss_itm, loss_lm = model(batch["image"], batch["caption"], alpha=alpha, candidates=candidates)
    return {"loss_itc": loss_itc, "loss_itm": loss_itm, "loss_lm": loss_lm}


class Watch:
    """Warns of two known ways in which pretraining fails."""

    def __init__(self, model: BLIP_Pretrain):
        self.model, self.stuck_since = model, 0

    def __call__(self, means: dict[str, float], progress: Progress) -> str:
        """Return a warning, '' for none."""
        if abs(means["loss_itm"] - CHANCE_ITM) > 0.005:
            self.stuck_since = progress.step
        if progress.step - self.stuck_since >= STUCK_STEPS:
            return (
                f"the matching loss has stayed at {CHANCE_ITM} since step {self.stuck_since}: matching ignores the "
                "image. Start from pretrained encoders (init: released), use a larger global batch, or warm up longer"
            )
        temperature = self.model.temp.item()
        low, high = TEMPERATURE_RANGE
        if not low < temperature < high:
            return (
                f"the temperature {temperature:.3g} is at its clamp {TEMPERATURE_RANGE}: contrast has collapsed or "
                "saturated. Lower init_lr, or look for captions that are all alike"
            )
        return ""


def build_model(config: PretrainConfig) -> BLIP_Pretrain:
    """Build the model with its starting weights."""
    model = blip_pretrain(**config.model_settings("embed_dim", "queue_size", "smooth_padding", "itc_all_ranks"))
    if config.init == "released" and not config.pretrained:
        if config.vit not in ("base", "large"):
            raise UserError(f"init: released has weights for vit base and large, not {config.vit!r}; set init: random")
        load_vit(model.visual_encoder, DEIT_URL if config.vit == "base" else VIT_IN21K)
        load_bert(model.text_encoder)
        load_bert(model.text_decoder.bert)
        copy_params(model)
    return model


def main(config: PretrainConfig, run: Run) -> None:
    """Pretrain and report."""
    if run.evaluate:
        raise UserError("pretraining has no evaluation; run train_caption.py or train_retrieval.py with --evaluate")
    if not (config.train_file or config.train_mix):
        raise UserError("train_file names no list of pairs; give at least one, for instance --set train_file=[a.json]")
    loader = make_loaders("pretrain", config, seed=run.seed)["train"]
    model, bad_images = build_model(config), BadImages(config.max_bad_images, run)
    task = Task(
        partial(train_step, alpha=config.alpha),
        bad_images.count,
        schedule=schedule,
        candidates=compute_candidates if config.itc_cached else None,
        inspect_batch=bad_images.inspect,
        inspect_losses=Watch(model),
    )
    scores = fit(run, config, model, loader, task)
    if bad_images.found:
        run.note(f"{len(bad_images.found)} unreadable images were replaced; they are listed in {bad_images.path}")
    report_scores(run, "Pretraining", scores, list)


if __name__ == "__main__":
    sys.exit(launch(main, PretrainConfig, "configs/pretrain.yaml", "output/pretrain", __doc__, EXAMPLES))
