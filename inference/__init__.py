"""Inference API: load a checkpoint, then caption, answer, match or encode images.

from inference import load
model = load("caption", "checkpoint.pth")
model.caption(["a.jpg"])
"""

from inference.loading import load

__all__ = ["load"]
