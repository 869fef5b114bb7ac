"""Mixed precision: the autocast context of the setting `amp`."""

from contextlib import AbstractContextManager, nullcontext

import torch

from utils import UserError

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of a setting.

    Args:
        amp: "bf16" for bfloat16; "fp16" for float16, for GPUs without bfloat16; "" for float32.
        device: where the model is.

    Raises:
        UserError: `amp` is none of these.
    """
    if not amp:
        return nullcontext()
    if amp not in AMP_TYPES:
        raise UserError(f"amp is {amp!r}; expected 'bf16', 'fp16', or '' for float32")
    return torch.autocast(device.type, AMP_TYPES[amp])
