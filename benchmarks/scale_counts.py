"""What a pretraining step holds, moves and does, counted on the model itself, run on tensors without storage."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rows import pretraining_floor, word_texts
from models.blip_pretrain import BLIP_Pretrain
from models.med import TextTransformer
from training import parallel

WIDTH = 4  # bytes of parameters, gradients, moments and the twin, which stay in float32 under bfloat16
BATCHES = (8, 16)  # pairs of the two runs whose difference is what a pair keeps
CAPTION = max(word_texts(75), key=lambda text: len(text.split()))  # a batch is padded to its longest text


@dataclass(frozen=True)
class Counts:
    """One model's step.

    Attributes:
        trained, twin: parameters, and those of the momentum twin.
        queues: bytes of both.
        pair_bytes: kept for the backward pass, a pair, in bfloat16.
        step_bytes: the same whatever the batch: matrices cast to bfloat16, copies of the queues.
        gflop: operations of a pair, counted by `benchmarks.floor`.
        kernels: operations that a step starts, views left out.
        gathered, scattered: parameters that fsdp gathers, and whose gradients it reduces, each as often as it is used.
        together: parameters that fsdp holds whole at once: what belongs to no block, and the largest block.
    """

    trained: int
    twin: int
    queues: int
    pair_bytes: float
    step_bytes: float
    gflop: float
    kernels: int
    gathered: int
    scattered: int
    together: int


def build(vit: Any, image: bool = False, text: bool = False, **settings: Any) -> BLIP_Pretrain:
    """Return the model without storage; `image` and `text` say what is checkpointed."""
    # dropout of attention off: with it a CPU keeps the attention, which a GPU's kernels do not
    shape = {**settings.pop("med_config", {}), "attention_probs_dropout_prob": 0.0}
    with torch.device("meta"):
        model = BLIP_Pretrain(shape, vit=vit, vit_grad_ckpt=image, vit_ckpt_layer=24, **settings).train()
    for part in model.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = text
    return model


class Kernels(TorchDispatchMode):
    """Counts operations that compute."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.number += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


class Kept(dict):
    """Bytes of every storage that the backward pass keeps, weights left out."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state, self.tensors = {t.untyped_storage()._cdata for t in state.values()}, []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor; holding it keeps its storage's address from being used again."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.state:
            self[storage._cdata] = storage.nbytes()
            self.tensors.append(tensor)
        return tensor


class Step(nn.Module):
    """Forward and backward pass in one call, since checkpointing reads the weights in both."""

    def __init__(self, model: BLIP_Pretrain):
        super().__init__()
        self.model = model

    def forward(self, kept: Kept, pairs: int) -> int:
        """Return the bytes kept by the forward pass."""
        image = torch.randn(pairs, 3, *self.model.visual_encoder.patch_embed.img_size)
        keeping = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
        with keeping, torch.autocast("cpu", torch.bfloat16):
            loss = sum(self.model(image, [CAPTION] * pairs, 0.4))
        held = sum(kept.values())
        loss.backward()
        return held


def run_step(model: BLIP_Pretrain, pairs: int) -> tuple[int, int]:
    """Return the bytes kept by a step's forward pass, and the operations of both passes."""
    step = Step(model)
    with FakeTensorMode(), patch("models.attention.FEW_QUERIES", 0):
        tensors = [*step.named_parameters(), *step.named_buffers()]
        state = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for n, t in tensors}
        with Kernels() as kernels:
            held = functional_call(step, state, (Kept(state), pairs))
    return held, kernels.number


@contextmanager
def counted_uses(model: BLIP_Pretrain) -> Iterator[Counter[nn.Module]]:
    """Count how often each unit of fsdp is gathered in a forward pass."""
    uses: Counter[nn.Module] = Counter()
    units = parallel._units(model)
    hooks = [unit.register_forward_pre_hook(lambda part, _: uses.update([part])) for unit in units]
    uses.update(layer.crossattention for layer in model.text_encoder.encoder.layer)  # `project` is no forward
    yield uses
    for hook in hooks:
        hook.remove()


def size(part: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in part.parameters())


def sharded(model: BLIP_Pretrain, uses: Counter[nn.Module]) -> dict[str, int]:
    """Return what fsdp gathers, reduces and holds whole, in parameters."""
    trains = {unit: next(unit.parameters()).requires_grad for unit in uses}
    units = parallel._units(model)
    rest = [p for p in model.parameters() if id(p) not in {id(q) for unit in units for q in unit.parameters()}]
    outside, learned = (sum(p.numel() for p in part) for part in (rest, [p for p in rest if p.requires_grad]))
    # a trained unit is gathered again in the backward pass; what belongs to no block stays from forward on
    gathered = sum(n * size(unit) * (1 + trains[unit]) for unit, n in uses.items()) + outside
    scattered = sum(n * size(unit) for unit, n in uses.items() if trains[unit]) + learned
    return {"gathered": gathered, "scattered": scattered, "together": outside + max(map(size, units))}


@cache
def count(vit: str, image: bool = False, text: bool = False) -> Counts:
    """Return everything about one ViT, 'base' or 'large', with and without checkpointing of either part."""
    return count_model(partial(build, vit, image, text))


def count_model(make: Callable[[], BLIP_Pretrain]) -> Counts:
    """Return everything about the model that `make` builds."""
    model, first, second = make(), make(), make()  # a run leaves tied weights apart, so each has its own
    with counted_uses(first) as uses:
        few, _ = run_step(first, BATCHES[0])
    many, kernels = run_step(second, BATCHES[1])
    pair = (many - few) / (BATCHES[1] - BATCHES[0])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Counts(
        trained=trained,
        twin=size(model) - trained,
        queues=WIDTH * (model.image_queue.numel() + model.text_queue.numel()),
        pair_bytes=pair,
        step_bytes=few - BATCHES[0] * pair,
        gflop=sum(part.gflop for part in pretraining_floor(model, [CAPTION] * BATCHES[0])) / BATCHES[0],
        kernels=kernels,
        **sharded(model, uses),
    )
