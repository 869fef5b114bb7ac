"""Training on several processes: whole copies (`parallel: ddp`), or weights and optimizer in shards (`parallel: fsdp`).

Checkpoints hold whole tensors under the model's own names either way, so that each way continues the other's runs.
"""

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from models.med import TextTransformer
from models.momentum import MomentumModel
from utils import UserError, get_world_size

SKELETON = "_plain_skeleton"  # where a sharded model keeps its plain form, without storage
Content = dict[str, Any]


def wrap(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """Make a model train on all processes; in one process, or under fsdp, the result is the model itself.

    Raises:
        UserError: `parallel` is neither ddp nor fsdp.
    """
    if parallel not in ("ddp", "fsdp"):
        raise UserError(f"parallel is {parallel!r}; expected 'ddp' (whole copies) or 'fsdp' (shards)")
    if get_world_size() == 1:
        return model
    for buffer in model.buffers():  # queues begin alike; from there on every rank keeps them so itself
        dist.broadcast(buffer, src=0)
    if parallel == "fsdp":
        return shard(model, device)
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():  # torch 2.15 renames the argument, torch 2.6 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


# Sharding.


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model's parameters over all processes, in place: by ViT block and by part of text layer, then the rest.

    The encoder and decoder of pretraining share parts of layers, not layers; hence the finer units there. Scalars
    (the temperature) stay whole, since they cannot be divided.
    """
    fully_shard, as_forward = _own_sharding()
    # `project` returns views, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    with torch.no_grad():
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)
    skeleton = _skeleton(model)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    if device.type == "cpu":
        _refuse_sums(partial(fully_shard, mesh=mesh))
    for unit in _units(model):
        fully_shard(unit, mesh=mesh)
        if hasattr(unit, "project"):
            as_forward(unit, "project")
        unit.register_forward_pre_hook(_gather_to_recompute, prepend=True)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.dim() == 0})
    object.__setattr__(model, SKELETON, skeleton)
    if isinstance(model, MomentumModel):
        as_forward(model, "candidates")
    return model


def _own_sharding() -> tuple[Callable[..., Any], Callable[[nn.Module, str], None]]:
    """Return PyTorch's `fully_shard`, and what makes another method gather parameters as forward does."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:  # torch 2.6 cannot leave scalars whole
        wanted = "parallel: fsdp needs torch 2.7 or newer"
        raise UserError(f"{wanted}, and this is {torch.__version__}; update torch, or set parallel: ddp")
    return fully_shard, register_fsdp_forward_method


def _refuse_sums(fully_shard: Callable[[nn.Module], Any]) -> None:
    """Refuse a gloo that adds gradients up where it is to average them, and tells nobody."""
    probe = nn.Linear(1, get_world_size(), bias=False, device="meta").to_empty(device="cpu")  # without a random number
    fully_shard(probe)
    probe(torch.ones(1, 1)).sum().backward()
    if (_whole(probe.weight.grad, None) != 1).any():
        told = f"parallel: fsdp on CPUs needs a newer torch than {torch.__version__}, which adds gradients up"
        raise UserError(f"{told} instead of averaging them; update torch, or set parallel: ddp")


def _gather_to_recompute(unit: nn.Module, _: Any) -> None:
    """Gather a part that runs again within a backward pass: torch before 2.11 leaves it in shards after another use."""
    if torch._C._current_graph_task_id() != -1:
        unit.unshard()  # type: ignore[operator]


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the parts that are gathered one at a time, each once however many models share it."""
    units = [part for name, part in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
    for text in (part for part in model.modules() if isinstance(part, TextTransformer)):
        for layer in text.encoder.layer:
            units += [layer.attention, layer.crossattention, layer.intermediate, layer.output]
    return list(dict.fromkeys(units))


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have shapes but no storage."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` has sharded a model."""
    return hasattr(model, SKELETON)


def compile_units(model: nn.Module, **options: Any) -> int:
    """Compile what a sharded model gathers one at a time, each by itself, without the gathering in hooks around it.

    Returns:
        The number of units.
    """
    units = _units(model)
    for unit in units:
        unit.forward = torch.compile(unit.forward, **options)  # type: ignore[method-assign]
    return len(units)


def plain(model: nn.Module) -> nn.Module:
    """Return a model to evaluate: itself, or of a sharded one a whole copy; all processes call it.

    Processes generate and rank different numbers of texts, which gathering layer by layer would not survive.
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
    """Divide parameters into those in shards and whole ones, which no fused call takes together."""
    groups = [[p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]]
    return [group for group in groups if group]


@torch.no_grad()
def finish_gradients(model: nn.Module, clip_grad: float) -> torch.Tensor:
    """Average gradients that sharding leaves as they are, and clip their norm to `clip_grad` (0: no limit).

    Returns:
        The norm of all gradients before clipping, a scalar on the device.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    local = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    if is_sharded(model):
        for grad in whole:
            dist.all_reduce(grad)
            grad /= get_world_size()
    norm = nn.utils.get_total_norm(whole)
    if local:
        square = nn.utils.get_total_norm(local).square()
        dist.all_reduce(square)
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
    """Return a state dict of whole tensors; of a sharded model on `device` (the CPU); all processes call it."""
    if not is_sharded(model):
        return model.state_dict()
    model.reshard()  # type: ignore[operator]  # forward leaves the outermost parameters gathered
    found: dict[int, torch.Tensor] = {}  # tied entries are one tensor in the file too
    state = model.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in found:
            found[id(value)] = _whole(value, device)
    return {name: found[id(value)] for name, value in state.items()}


def _like(value: Any, parameter: Any) -> Any:
    """Shard a whole tensor as a parameter of its shape is."""
    if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def load_full_state(model: nn.Module, state: Content) -> None:
    """Load a state dict of whole tensors.

    Raises:
        RuntimeError: names or shapes differ.
    """
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]
        own = model.state_dict(keep_vars=True)
        state = {name: _like(value, own.get(name)) for name, value in state.items()}
    model.load_state_dict(state)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Content:
    """Return an optimizer's state as one group over the model's trainable parameters, in whole tensors."""
    if not is_sharded(model):
        return optimizer.state_dict()
    params = [p for p in model.parameters() if p.requires_grad]
    state = {
        number: {name: _whole(value, None) for name, value in optimizer.state[p].items()}
        for number, p in enumerate(params)
        if p in optimizer.state
    }
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(params)))}]}


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, content: Content) -> None:
    """Load what `full_optimizer_state` gave, of a sharded model or of a whole one."""
    if is_sharded(model):
        trainable = {p: number for number, p in enumerate(p for p in model.parameters() if p.requires_grad)}
        order = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            place: {name: _like(value, p) for name, value in content["state"][trainable[p]].items()}
            for place, p in enumerate(order)
            if trainable[p] in content["state"]
        }
        (saved,) = content["param_groups"]
        groups = [{**saved, "params": own["params"]} for own in optimizer.state_dict()["param_groups"]]
        content = {"state": state, "param_groups": groups}
    optimizer.load_state_dict(content)
