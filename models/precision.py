"""Mixed precision: the autocast context of the setting `amp`."""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from utils import UserError, is_main_process

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of a setting.

    Args:
        amp: "bf16" for bfloat16; "fp16" for float16, for GPUs without bfloat16; "" for float32; "auto" for bfloat16
            on a device with instructions for it, else float32.
        device: where the model is.

    Raises:
        UserError: `amp` is none of these.
    """
    if amp == "auto":
        amp = "bf16" if has_bfloat16(device.type) else ""
    if not amp:
        return nullcontext()
    if amp not in AMP_TYPES:
        raise UserError(f"amp is {amp!r}; expected 'bf16', 'fp16', 'auto', or '' for float32")
    if amp == "bf16" and not has_bfloat16(device.type):
        note_slow_bfloat16(device.type)
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


@cache
def note_slow_bfloat16(device_type: str) -> None:
    """Print once that bfloat16 is emulated."""
    if is_main_process():
        reason = f"this {device_type} has no bfloat16 instructions"
        print(f"note: amp: bf16 is slower than float32 here, because {reason}; set amp: auto or ''", file=sys.stderr)
