"""Linear maps by the faster of a CPU's two float32 products.

PyTorch multiplies float32 matrices by MKL, which on other processors than Intel's leaves half of the vector unit
unused, and reads a matrix slowly when it has few rows to multiply. oneDNN, which PyTorch carries for convolutions and
bfloat16, does neither: on an AMD Zen 5 it is twice as fast, forward and backward. `torch.compile` takes it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

LEAST = 2**21  # multiplications of a product; below, handing it to oneDNN costs more than it saves

onednn = (  # where it gains: other processors' PyTorch, Apple's for instance, has products of their makers
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


class Linear(nn.Linear):
    """`nn.Linear`, with its parameters and results, and on a CPU the faster product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if not is_faster(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        if torch.is_grad_enabled():
            y = LinearMap.apply(rows, self.weight, self.bias)
        else:
            y = product(rows, self.weight, self.bias)
        return y.unflatten(0, x.shape[:-1])


class LinearMap(torch.autograd.Function):
    """The map, and both products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map rows (rows, in) by (out, in) and (out,) to (rows, out)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of those inputs that need one, from the result's (rows, out)."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if need_x else None,
            product(grad.t(), x.t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (rows, in) times weight (out, in) transposed, plus bias (out,), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether oneDNN should do it: in float32 on a CPU, eagerly, and where it is work."""
    return (
        onednn
        and not torch.compiler.is_compiling()  # first: a graph should serve any number of rows
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and not torch.is_autocast_enabled("cpu")
    )


def use_faster_products(module: nn.Module) -> None:
    """Turn every `nn.Linear` of a module made elsewhere into ours, in place; names and parameters stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear


@contextmanager
def pytorch_products() -> Iterator[None]:
    """Leave all products to PyTorch meanwhile, to compare."""
    global onednn
    kept, onednn = onednn, False
    try:
        yield
    finally:
        onednn = kept
