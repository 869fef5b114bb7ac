"""Linear layers that use oneDNN on x86 CPUs.

PyTorch multiplies float32 matrices with MKL, which is slow for few rows, as in decoding, and leaves half of the
AVX-512 unit of AMD processors unused. oneDNN, part of PyTorch too, is twice as fast on an AMD Zen 5, forward and
backward. On an AMD EPYC with AVX2 alone it is 1.1 to 3 times as fast for up to 100 rows and 1.2 to 3 times for the
vocabulary's columns, but 10% slower for more rows and slower in the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from utils import UserError, note_once

MIN_MULTIPLICATIONS = 2**21  # in smaller products the call of oneDNN costs more than it saves
MOST_ROWS, MANY_COLUMNS = 128, 8192  # with AVX2 alone, MKL is faster for more rows, except into many columns
LARGE_WEIGHT = 2**19  # a smaller one stays in the cache, and its results should not depend on the number of rows
CHOICES = ("auto", "onednn", "torch")

enabled = True  # False within `pytorch_products`


def use_cpu_products(model: nn.Module, choice: str = "auto") -> nn.Module:
    """Choose how the linear layers of a model multiply in float32 on a CPU; elsewhere nothing changes.

    `choice` is "onednn", "torch" for PyTorch's own products, or "auto": oneDNN on a CPU with AVX-512, and for few
    rows without gradients on a CPU with AVX2. The layers keep their class, names and parameters. Returns the model.
    """
    if choice not in CHOICES:
        raise UserError(f"cpu_products is {choice!r}; expected {', '.join(CHOICES)}")
    if choice == "onednn" and not has_onednn():
        note_once("cpu_products: onednn has no effect, this PyTorch is built without oneDNN")
    forward = forward_of(choice) if has_onednn() else None
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__dict__.pop("forward", None)
            if forward:
                part.forward = MethodType(forward, part)  # type: ignore[method-assign]  # deepcopy rebinds a method
    return model


def forward_of(choice: str) -> Callable[[nn.Linear, torch.Tensor], torch.Tensor] | None:
    """Return the forward of a linear layer by oneDNN for this processor, None for `nn.Linear`'s own."""
    if choice == "auto":
        return {"AVX512": linear, "AVX2": linear_of_few_rows}.get(torch.backends.cpu.get_cpu_capability())
    return linear if choice == "onednn" else None


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


def linear_of_few_rows(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`, by oneDNN for few rows or many columns, without gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # a graph must not depend on the number of rows
        return F.linear(x, layer.weight, layer.bias)
    few = x.numel() <= MOST_ROWS * layer.in_features and layer.weight.numel() >= LARGE_WEIGHT
    return linear(layer, x) if few or layer.out_features >= MANY_COLUMNS else F.linear(x, layer.weight, layer.bias)


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
