"""Models whose weights and inputs a formula gives, as tests/golden/README.md describes them."""

import gzip
import json
import zlib
from functools import cache, lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from models import med
from models.blip import BLIP_Base, BLIP_Decoder
from models.blip_classification import BLIP_Classification
from models.blip_dialogue import BLIP_Dialogue
from models.blip_itm import BLIP_ITM
from models.blip_nlvr import BLIP_NLVR
from models.blip_pretrain import BLIP_Pretrain
from models.blip_retrieval import BLIP_Retrieval
from models.blip_vqa import BLIP_VQA
from models.cpu_products import use_cpu_products

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
MED_CONFIG = TINY / "med_config.json"
products = "torch"  # of linear layers, see `models.cpu_products`
MODELS = {
    "feature_extractor": BLIP_Base,
    "decoder": BLIP_Decoder,
    "vqa": BLIP_VQA,
    "itm": BLIP_ITM,
    "retrieval": BLIP_Retrieval,
    "nlvr": BLIP_NLVR,
    "classification": BLIP_Classification,
    "dialogue": BLIP_Dialogue,
    "pretrain": BLIP_Pretrain,
}


@lru_cache
def golden():
    """Strings and scalars."""
    return json.loads((TINY / "golden.json").read_text())


@lru_cache
def arrays(name="golden"):
    """Arrays of golden.npz or masked.npz."""
    return dict(np.load(TINY / f"{name}.npz"))


@lru_cache
def manifest():
    """The released state dicts."""
    return json.loads(gzip.open(GOLDEN / "state_dict_manifest.json.gz").read())


def expected(name, smooth_padding=True):
    """A golden array."""
    return arrays("golden" if smooth_padding else "masked")[name]


def random_state(name):
    """The formula's random numbers for a name."""
    return np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)


def arr(name, shape):
    """A float32 tensor of standard normal numbers."""
    return torch.from_numpy(random_state(name).standard_normal(shape).astype(np.float32))


def img(name, batch=2):
    """Images of an entry."""
    return arr("a:" + name, (batch, 3, 48, 48))


@cache
def formula_value(key, shape):
    """The value of a state-dict entry, numpy, float64 or int64; not to be changed."""
    if key == "temp":
        return np.float64(0.07)
    if key.endswith(("queue_ptr", "ptr_queue")):
        return np.zeros(shape, np.int64)
    if key.endswith("idx_queue"):
        return np.full(shape, -100)
    x = random_state(key).standard_normal(shape)
    if key in ("image_queue", "text_queue"):
        return x / np.linalg.norm(x, axis=0)
    if key.endswith("bias"):
        return 0.1 * x
    if len(shape) == 1:
        return 1 + 0.1 * x
    if "embeddings.weight" in key:
        return 0.1 * x
    if key.endswith(("pos_embed", "cls_token")):
        return 0.5 * x
    return x / np.sqrt(np.prod(shape[1:]))


@torch.no_grad()
def fill(model):
    """Give a model its formula weights; a tied entry keeps the value of the earlier one it shares."""
    seen = set()
    for key, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            value.copy_(torch.as_tensor(formula_value(key, tuple(value.shape))))
        seen.add(value.data_ptr())
    return model.eval()


def build(name, vocab_file="", num_layers=None, **kwargs):
    """A tiny model of one kind with formula weights, in eval mode.

    By default it has the 8 text layers and the vocabulary, bert-base-uncased's, of the golden values. NLVR2's merges
    begin at layer 6, of fewer layers at the last one.
    """
    spec = golden()["spec"]
    if name in ("retrieval", "pretrain"):
        kwargs["embed_dim"] = spec["embed_dim"]
    # "itm" keeps its default of 256: with the 32 of `spec`, itm/itc is off by 0.15, with 256 by 2e-7
    if name in ("retrieval", "pretrain"):
        kwargs["queue_size"] = spec["queue_size"]
    if name in ("vqa", "nlvr"):
        kwargs.setdefault("drop_path_rate", 0.0)
    med_config = {**json.loads(MED_CONFIG.read_text()), "vocab_file": str(vocab_file)}
    if name == "pretrain":
        med_config["vocab_size"] = 30522
    med_config["num_hidden_layers"] = layers = num_layers or med_config["num_hidden_layers"]
    with mock.patch.object(med, "FIRST_MERGE_LAYER", min(med.FIRST_MERGE_LAYER, layers - 1)):
        model = MODELS[name](med_config=med_config, image_size=spec["image_size"], vit=spec["vit"], **kwargs)
    return use_cpu_products(fill(model), products)


@torch.no_grad()
def load_trained(model, name):
    """Load short-trained weights (float16) over the formula's."""
    state = model.state_dict()
    for key, value in np.load(TINY / f"trained_{name}.npz").items():
        state[key].copy_(torch.from_numpy(value.astype(np.float32)))
    return model


def train(model, num_steps, losses_of_step):
    """Run AdamW steps and return each step's losses (steps, losses) as numpy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rows = []
    for step in range(num_steps):
        losses = losses_of_step(step)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        rows.append([loss.item() for loss in losses])
    return np.array(rows)


def grad_norms(model):
    """L2 norm of each parameter's gradient."""
    # in float64: a float32 sum over two million word-embedding gradients is itself off by 2e-4
    return {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(value, expected, rtol=1e-5, atol=1e-5):
    """Compare a tensor or array with golden values at the tolerance of one pass."""
    value = value.detach().numpy() if torch.is_tensor(value) else value
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol)
