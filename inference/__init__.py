"""Inference API: load a checkpoint, then caption, answer, match or encode images.

from inference import load
model = load("caption", "checkpoint.pth")
model.caption(["a.jpg"])
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is used: `inference.onnx` runs without PyTorch, which it needs."""
    if name == "load":
        from inference.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
