"""Mixed precision: the autocast context of the setting `amp`."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from utils import UserError, note_once

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of a setting on a device.

    `amp` is "bf16" for bfloat16; "fp16" for float16, for GPUs without bfloat16; "" for float32; or "auto" for bfloat16
    on a device with instructions for it, else float32.
    """
    if amp == "auto":
        amp = "bf16" if has_bfloat16(device.type) else ""
    if not amp:
        return nullcontext()
    if amp not in AMP_TYPES:
        raise UserError(f"amp is {amp!r}; expected 'bf16', 'fp16', 'auto', or '' for float32")
    if amp == "bf16" and not has_bfloat16(device.type):
        reason = f"this {device.type} has no bfloat16 instructions"
        note_once(f"amp: bf16 is slower than float32 here, because {reason}; set amp: auto or ''")
    return torch.autocast(device.type, AMP_TYPES[amp])


@cache
def has_bfloat16(device_type: str) -> bool:
    """Return True if the device has instructions for products in bfloat16."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    return True
