"""The BLIP models. `load` gives one that takes images:

from models import load
model = load("caption", "checkpoint.pth")
model.caption(["a.jpg"])
"""

from typing import Any


def load(task: str, checkpoint: str, **settings: Any) -> Any:
    """Load a checkpoint for "caption", "vqa", "match" or "features"; see `inference.predictor.load`."""
    from inference.predictor import load as load_predictor  # the one door that opens upwards

    return load_predictor(task, checkpoint, **settings)
