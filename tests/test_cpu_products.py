"""Linear layers by oneDNN: results and gradients of PyTorch's, only where they should be, and chosen from outside."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from formula import build, img
from models import cpu_products
from models.cpu_products import (
    MANY_COLUMNS,
    MIN_MULTIPLICATIONS,
    MOST_ROWS,
    has_onednn,
    is_supported,
    pytorch_products,
    use_cpu_products,
)  # fmt: skip
from models.vit import create_vit
from utils import UserError, note_once

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch is built without oneDNN")
ROWS, IN, OUT = 120, 160, 140  # above the least number of multiplications


def layer(*sizes):
    return use_cpu_products(nn.Linear(*sizes), "onednn")


def both(work):
    """The result by oneDNN and by PyTorch."""
    with pytorch_products():
        expected = work()
    return work(), expected


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (3, ROWS // 3)])
def test_results_and_gradients_are_pytorchs(bias, shape):
    torch.manual_seed(0)
    linear, x = layer(IN, OUT, bias), torch.randn(*shape, IN, requires_grad=True)
    assert is_supported(x, linear.weight)

    def work():
        y = linear(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *linear.parameters()])]

    for found, expected in zip(*both(work), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@needs_onednn
def test_rows_that_are_not_contiguous():
    linear, x = layer(IN, OUT).requires_grad_(False), torch.randn(IN, ROWS).t()
    torch.testing.assert_close(*both(lambda: linear(x)), rtol=1e-5, atol=1e-5)
    last = torch.randn(ROWS, 2, IN)[:, -1]
    torch.testing.assert_close(*both(lambda: linear(last)), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_frozen_parameters_get_no_gradient():
    linear, x = layer(IN, OUT), torch.randn(ROWS, IN, requires_grad=True)
    linear.weight.requires_grad_(False)
    linear(x).sum().backward()
    assert linear.weight.grad is None and x.grad.shape == x.shape and linear.bias.grad.shape == (OUT,)


@needs_onednn
def test_small_mixed_and_double_products_are_left_to_pytorch(monkeypatch):
    def fail(*_):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(cpu_products, "multiply", fail)
    linear, x = layer(IN, OUT), torch.randn(ROWS, IN)
    linear(x[: MIN_MULTIPLICATIONS // (IN * OUT)])
    assert copy.deepcopy(linear).double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    shapes = ({0: torch.export.Dim("rows", max=2 * ROWS)},)
    torch.export.export(linear, (x,), dynamic_shapes=shapes)
    with pytest.raises(AssertionError, match="oneDNN"):
        linear(x)


@needs_onednn
def test_models_keep_their_classes_and_names_and_the_choice_can_be_changed():
    vit, _ = create_vit({"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}, 32)
    names = list(vit.state_dict())
    for choice, overridden in (("onednn", 8), ("torch", 0)):
        use_cpu_products(vit, choice)
        layers = [part for part in vit.modules() if type(part) is nn.Linear]
        assert sum("forward" in part.__dict__ for part in layers) == overridden and len(layers) == 8
        assert list(vit.state_dict()) == names


@needs_onednn
def test_a_copy_of_a_model_uses_its_own_weights(monkeypatch):
    monkeypatch.setattr(cpu_products, "MIN_MULTIPLICATIONS", 0)
    model = use_cpu_products(build("itm"), "onednn")
    expected = model(img("itm"), ["a red ring", "a star"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(img("itm"), ["a red ring", "a star"]).abs().max() == 0
    assert torch.equal(model(img("itm"), ["a red ring", "a star"]), expected)


@needs_onednn
@pytest.mark.parametrize("capability, with_gradients, without", [
    ("AVX512", True, True), ("AVX2", False, True), ("DEFAULT", False, False),
])  # fmt: skip
def test_auto_by_the_processor(capability, with_gradients, without, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "multiply", lambda *args: calls.append(args) or torch.nn.functional.linear(*args))
    linear, x = use_cpu_products(nn.Linear(IN, OUT)), torch.randn(ROWS, IN)
    with torch.no_grad():
        linear(x)
    assert bool(calls) == (capability == "AVX512")  # a small weight
    monkeypatch.setattr(cpu_products, "LARGE_WEIGHT", IN * OUT)
    calls.clear()
    linear(x)
    assert bool(calls) == with_gradients
    calls.clear()
    with torch.no_grad():
        linear(x)
        assert bool(calls) == without
        calls.clear()
        linear(torch.randn(MOST_ROWS + 1, IN))
        assert bool(calls) == (capability == "AVX512")
        calls.clear()
        use_cpu_products(nn.Linear(IN, MANY_COLUMNS))(torch.randn(MOST_ROWS + 1, IN))
        assert bool(calls) == without


@needs_onednn
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_tensors_on_a_gpu_are_left_to_pytorch(capability, monkeypatch):
    def fail(*_):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "multiply", fail)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        y = use_cpu_products(nn.Linear(1024, MANY_COLUMNS))(torch.empty(4, 1024))
    assert y.device.type == "cuda" and y.shape == (4, MANY_COLUMNS)


def test_choices(monkeypatch, capsys):
    with pytest.raises(UserError, match="cpu_products is 'mkl'; expected auto, onednn, torch"):
        use_cpu_products(nn.Linear(2, 3), "mkl")
    monkeypatch.setattr(cpu_products, "has_onednn", lambda: False)
    note_once.cache_clear()
    for _ in range(2):
        assert "forward" not in use_cpu_products(nn.Linear(2, 3), "onednn").__dict__
    assert capsys.readouterr().err.count("onednn has no effect") == 1


def test_pytorch_products_ends_after_an_error():
    with pytest.raises(KeyError), pytorch_products():
        raise KeyError
    assert cpu_products.enabled
