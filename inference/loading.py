"""Loading a checkpoint for one of the tasks of inference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from inference.features import Extractor, feature_model
from inference.predictor import Predictor
from inference.tasks import Answerer, Captioner, Matcher
from models.architecture import settings_of
from models.blip import blip_decoder
from models.blip_itm import blip_itm
from models.blip_vqa import blip_vqa
from models.cpu_products import use_cpu_products
from models.pretrained import refuse_fresh_parts
from utils import UserError, allow_tf32, choose_device

TASKS: dict[str, tuple[type[Predictor], Callable[..., nn.Module]]] = {
    "caption": (Captioner, blip_decoder),
    "vqa": (Answerer, blip_vqa),
    "match": (Matcher, blip_itm),
    "features": (Extractor, feature_model),
}


def load(
    task: str, checkpoint: str | Path, device: str = "", amp: str = "", allow_pickle: bool = False,
    cpu_products: str = "auto", tf32: bool = True, **settings: Any,
) -> Any:  # fmt: skip
    """Load a checkpoint for a task.

    Args:
        task: "caption", "vqa", "match" or "features", for a `Captioner`, `Answerer`, `Matcher` or `Extractor`.
        checkpoint: a path, a URL or `hf:owner/name`.
        device: "cuda", "xpu", "mps" or "cpu"; "" for a GPU where there is one.
        amp: "bf16", "fp16" or "auto" for mixed precision.
        allow_pickle: accept a file that may run code when it is read.
        cpu_products: float32 products on a CPU, as for `models.cpu_products.use_cpu_products`.
        tf32: float32 products on a GPU use TF32, as the released code did.
        settings: replace the checkpoint's own: image_size, vit, med_config, prompt, ...; None keeps them.

    Raises:
        UserError: another task, no such device, or a checkpoint that does not fit the task.
    """
    if task not in TASKS:
        raise UserError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    source, on = str(checkpoint), choose_device(device)
    arguments, config = settings_of(source, allow_pickle)
    arguments |= {key: value for key, value in settings.items() if value is not None}
    predictor, factory = TASKS[task]
    if task == "caption" and "prompt" in config:
        arguments.setdefault("prompt", config["prompt"])
    if task == "match":
        arguments.setdefault("first_token", "enc")  # as the head was trained; "cls" is what the released demo does
    elif task != "features":
        arguments.pop("embed_dim", None)
    allow_tf32(tf32)
    model = factory(pretrained=source, allow_pickle=allow_pickle, **arguments)
    refuse_fresh_parts(model)
    model = use_cpu_products(model.to(on).eval(), cpu_products)
    return predictor(model, arguments["image_size"], amp, config)
