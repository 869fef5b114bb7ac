"""Training on several processes: replicated (`parallel: ddp`), or with sharded weights and optimizer (`fsdp`).

Checkpoints hold whole tensors under the model's own names, so a run may change from one to the other.
"""

import copy
import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from models.med import TextTransformer
from models.momentum import MomentumModel
from utils import UserError, all_reduce, all_reduce_mean, broadcast_, get_world_size

SKELETON = "_skeleton"  # attribute of a sharded model: its unsharded form on the device "meta"
Content = dict[str, Any]


def wrap(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """Return a model in DistributedDataParallel, or sharded in place; a single process gets the model itself."""
    if get_world_size() == 1:
        return model
    broadcast_(model.buffers())  # the queues: equal at the start, and every rank updates them alike
    if parallel == "fsdp":
        return shard(model, device)
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers, torch 2.6 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


# Sharding.


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model's parameters over all processes, in place; UserError if this version of PyTorch cannot do that.

    ViT blocks and parts of text layers are gathered one at a time, the rest together. The units are parts of layers
    because the encoder and decoder of pretraining share those, not layers. Scalars (the temperature) stay whole.
    """
    if "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:  # needed for scalars
        problem = f"parallel: fsdp needs torch 2.7 or newer, and this is {torch.__version__}"
        raise UserError(f"{problem}; update torch, or set parallel: ddp")
    # `project` returns views, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    broadcast_(model.parameters())
    skeleton = _skeleton(model)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    fully_shard = partial(fsdp.fully_shard, mesh=mesh)
    if device.type == "cpu":
        _check_averaging(fully_shard)
    for unit in _units(model):
        fully_shard(unit)
        if hasattr(unit, "project"):
            fsdp.register_fsdp_forward_method(unit, "project")
        if torch.__version__ < (2, 11):  # leaves it in shards when it is recomputed
            unit.register_forward_pre_hook(lambda unit, _: unit.unshard(), prepend=True)
    fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})
    object.__setattr__(model, SKELETON, skeleton)
    if isinstance(model, MomentumModel):
        fsdp.register_fsdp_forward_method(model, "candidates")
    return model


def _check_averaging(fully_shard: Any) -> None:
    """Raise UserError if gloo sums gradients that it should average, as in torch before 2.8."""
    probe = nn.Linear(1, get_world_size(), bias=False, device="meta").to_empty(device="cpu")  # draws no random number
    fully_shard(probe)
    probe(torch.ones(1, 1)).sum().backward()
    if (_whole(probe.weight.grad, None) != 1).any():
        problem = f"parallel: fsdp on CPUs: torch {torch.__version__} sums gradients that it should average"
        raise UserError(f"{problem}; update torch, or set parallel: ddp")


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the parts that are gathered one at a time, shared ones once."""
    units = [part for name, part in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    for text in (part for part in model.modules() if isinstance(part, TextTransformer)):
        for layer in text.encoder.layer:
            units += [layer.attention, layer.crossattention, layer.intermediate, layer.output]
    return list(dict.fromkeys(units))


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the device "meta", without storage."""
    memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard` has sharded the model."""
    return hasattr(model, SKELETON)


def compile_units(model: nn.Module, **options: Any) -> int:
    """Compile the units of a sharded model, without the hooks that gather them; return their number."""
    units = _units(model)
    for unit in units:
        unit.forward = torch.compile(unit.forward, **options)  # type: ignore[method-assign]
    return len(units)


def plain(model: nn.Module) -> nn.Module:
    """Return the model to evaluate: the model itself, or an unsharded copy of a sharded one; all ranks call it.

    Ranks generate and rank different numbers of texts, so they cannot gather a layer at the same time.
    """
    if not is_sharded(model):
        return model
    device = next(model.parameters()).device
    whole = copy.deepcopy(getattr(model, SKELETON))
    state = {name: value.to(device) for name, value in full_state(model, device).items()}
    whole.load_state_dict(state, assign=True)
    return whole.train(model.training)


# Gradients.


def split_params(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into sharded and whole ones, which a fused call does not take together."""
    groups = [[p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]]
    return [group for group in groups if group]


@torch.no_grad()
def finish_gradients(model: nn.Module, clip_grad: float) -> torch.Tensor:
    """Average gradients that sharding leaves as they are, clip them, and return their norm before clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    local = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    if is_sharded(model):
        for grad in whole:
            grad.copy_(all_reduce_mean(grad))
    norm = nn.utils.get_total_norm(whole) if whole else local[0].new_zeros(())  # of none it is a scalar of the CPU
    if local:
        square = all_reduce(nn.utils.get_total_norm(local).square())
        norm = (square + norm.to(square.device).square()).sqrt()
    if clip_grad > 0:
        torch._foreach_mul_(local + whole, (clip_grad / (norm + 1e-6)).clamp(max=1.0))
    return norm


# Checkpoints.


def _whole(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().to(device or "cpu") if torch.is_tensor(value) else value


def full_state(model: nn.Module, device: torch.device | None = None) -> Content:
    """Return a state dict of whole tensors, of a sharded model on `device` (default: CPU); all ranks call it."""
    if not is_sharded(model):
        return model.state_dict()
    model.reshard()  # type: ignore[operator]  # forward leaves the outermost parameters gathered
    found: dict[int, torch.Tensor] = {}  # tied entries stay one tensor
    state = model.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in found:
            found[id(value)] = _whole(value, device)
    return {name: found[id(value)] for name, value in state.items()}


def _like(value: Any, parameter: Any) -> Any:
    """Shard a whole tensor like a parameter of the same shape."""
    if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_full_state(model: nn.Module, state: Content) -> None:
    """Load a state dict of whole tensors; RuntimeError if names or shapes differ."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]
        own = model.state_dict(keep_vars=True)
        state = {name: _like(value, own.get(name)) for name, value in state.items()}
    model.load_state_dict(state)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Content:
    """Return an optimizer's state as one group over the model's trainable parameters, in whole tensors.

    So it does not depend on the groups, which sharding divides. Settings are those of the first group.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    state = {
        number: {
            name: _whole(value, None) if is_sharded(model) else value for name, value in optimizer.state[p].items()
        }
        for number, p in enumerate(params)
        if p in optimizer.state
    }
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(params)))}]}


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, content: Content) -> None:
    """Load what `full_optimizer_state` returned, into any groups; or an optimizer's own state of the same groups.

    Raises:
        ValueError: it is of another number of parameters, or of other groups.
    """
    saved, *others = content["param_groups"]
    if others:  # as checkpoints of whole copies held several groups once
        optimizer.load_state_dict(content)
        return
    trainable = {p: number for number, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    if len(saved["params"]) != len(trainable):
        raise ValueError(f"{len(saved['params'])} parameters; expected {len(trainable)}")
    order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        place: {name: _like(value, p) for name, value in content["state"][trainable[p]].items()}
        for place, p in enumerate(order)
        if trainable[p] in content["state"]
    }
    groups = [{**saved, "params": own["params"]} for own in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
