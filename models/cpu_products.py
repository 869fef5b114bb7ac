"""Linear layers that use oneDNN on AVX-512 CPUs.

PyTorch multiplies float32 matrices with MKL, which leaves half of the vector unit of AMD processors unused and is slow
for few rows. oneDNN, part of PyTorch too, is twice as fast on an AMD Zen 5, forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from utils import UserError, note_once

MIN_MULTIPLICATIONS = 2**21  # in smaller products the call of oneDNN costs more than it saves
CHOICES = ("auto", "onednn", "torch")

enabled = True  # False within `pytorch_products`


def use_cpu_products(model: nn.Module, choice: str = "auto") -> nn.Module:
    """Choose how the linear layers of a model multiply in float32 on a CPU; elsewhere nothing changes.

    `choice` is "onednn", "torch" for PyTorch's own products, or "auto": oneDNN on a CPU with AVX-512. The layers keep
    their class, names and parameters. Returns the model.
    """
    if choice not in CHOICES:
        raise UserError(f"cpu_products is {choice!r}; expected {', '.join(CHOICES)}")
    if choice == "onednn" and not has_onednn():
        note_once("cpu_products: onednn has no effect, this PyTorch is built without oneDNN")
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    onednn = has_onednn() and (choice == "onednn" or (choice == "auto" and avx512))
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__dict__.pop("forward", None)
            if onednn:
                part.forward = MethodType(linear, part)  # type: ignore[method-assign]  # deepcopy rebinds a method
    return model


def has_onednn() -> bool:
    """Return True if this PyTorch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`: map (..., in) to (..., out)."""
    if not is_supported(x, layer.weight):
        return F.linear(x, layer.weight, layer.bias)
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        y = LinearFunction.apply(rows, layer.weight, layer.bias)
    else:
        y = multiply(rows, layer.weight, layer.bias)
    return y.unflatten(0, x.shape[:-1])


class LinearFunction(torch.autograd.Function):
    """A linear layer and its backward pass by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map rows (rows, in) by weight (out, in) and bias (out,) to (rows, out)."""
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias from that of the result (rows, out)."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t()) if need_x else None,
            multiply(grad.t(), x.t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x (rows, in) times the transpose of weight (out, in), plus bias (out,), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_supported(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True for a float32 product on the CPU, in eager mode, that is large enough to gain."""
    return (
        not torch.compiler.is_compiling()  # first, so that a graph does not depend on the number of rows
        and enabled
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Leave all products to PyTorch within the context, for comparison."""
    global enabled
    kept, enabled = enabled, False
    try:
        yield
    finally:
        enabled = kept
