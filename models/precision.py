"""Mixed precision: the autocast context of the setting `amp`."""

from contextlib import AbstractContextManager, nullcontext

import torch

from utils import UserError


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of a setting.

    Args:
        amp: "bf16" for bfloat16, "" for float32.
        device: where the model is.

    Raises:
        UserError: `amp` is neither.
    """
    if amp not in ("", "bf16"):
        raise UserError(f"amp is {amp!r}; expected 'bf16', or '' for float32")
    return torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()
