"""State dicts of all models and sizes against the released ones: names, shapes, ties, trainable count."""

import pytest
import torch

from formula import MODELS, manifest


@pytest.mark.parametrize("entry", manifest())
def test_state_dict(entry):
    name, vit = entry.rsplit("_", 1)
    released = manifest()[entry]
    with torch.device("meta"):
        model = MODELS[name](image_size=released["image_size"], vit=vit)
    state = model.state_dict()
    keys = {key: shape for key, (shape, _) in released["keys"].items() if not key.endswith("position_ids")}
    assert list(state) and {key: list(value.shape) for key, value in state.items()} == keys
    for key, (_, dtype) in released["keys"].items():
        assert key not in state or str(state[key].dtype) == f"torch.{dtype}", key
    assert ties(model) == released["tied"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == released["trainable"]


def ties(model):
    """Each tied name and the earlier name that shares its parameter."""
    first, found = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    order = list(model.state_dict())
    return {name: earlier for name, earlier in found.items() if order.index(earlier) < order.index(name)}
