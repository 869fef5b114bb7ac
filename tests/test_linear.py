"""oneDNN's product in place of PyTorch's: the same map, the same gradients, and only where it should be."""

import copy

import pytest
import torch
from torch import nn

from models import linear
from models.linear import LEAST, Linear, is_faster, pytorch_products, use_faster_products
from models.vit import create_vit

pytestmark = pytest.mark.skipif(not linear.onednn, reason="oneDNN is for processors with AVX-512")
ROWS, IN, OUT = 150, 160, 140  # above the least that is worth it


def both(work):
    """The work's result by oneDNN and by PyTorch."""
    with pytorch_products():
        plain = work()
    return work(), plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (3, ROWS // 3)])
def test_results_and_gradients_are_pytorchs(bias, shape):
    torch.manual_seed(0)
    maps, x = Linear(IN, OUT, bias), torch.randn(*shape, IN, requires_grad=True)
    assert is_faster(x, maps.weight)

    def work():
        y = maps(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *maps.parameters()])]

    for found, expected in zip(*both(work), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_rows_that_do_not_lie_together():
    maps, x = Linear(IN, OUT).requires_grad_(False), torch.randn(IN, ROWS).t()
    torch.testing.assert_close(*both(lambda: maps(x)), rtol=1e-5, atol=1e-5)
    last = torch.randn(ROWS, 2, IN)[:, -1]
    torch.testing.assert_close(*both(lambda: maps(last)), rtol=1e-5, atol=1e-5)


def test_what_is_frozen_gets_no_gradient():
    maps, x = Linear(IN, OUT), torch.randn(ROWS, IN, requires_grad=True)
    maps.weight.requires_grad_(False)
    maps(x).sum().backward()
    assert maps.weight.grad is None and x.grad.shape == x.shape and maps.bias.grad.shape == (OUT,)


def test_small_mixed_and_double_products_are_left_to_pytorch(monkeypatch):
    def fail(*_):
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(linear, "product", fail)
    maps, x = Linear(IN, OUT), torch.randn(ROWS, IN)
    maps(x[: LEAST // (IN * OUT)])
    assert copy.deepcopy(maps).double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert maps(x).dtype == torch.bfloat16
    shapes = ({0: torch.export.Dim("rows", max=2 * ROWS)},)
    torch.export.export(maps, (x,), dynamic_shapes=shapes)
    with pytest.raises(AssertionError, match="oneDNN"):
        maps(x)


def test_the_vit_uses_it_with_its_own_names():
    vit, _ = create_vit({"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}, 32)
    maps = [part for part in vit.modules() if isinstance(part, nn.Linear)]
    assert len(maps) == 8 and all(type(part) is Linear for part in maps)
    other = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    names = set(other.state_dict())
    use_faster_products(other)
    assert type(other[0]) is Linear and set(other.state_dict()) == names


def test_pytorch_products_ends():
    with pytest.raises(KeyError), pytorch_products():
        raise KeyError
    assert linear.onednn
