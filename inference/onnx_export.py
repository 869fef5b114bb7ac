"""Write the captioner or the VQA model as ONNX graphs, over which `inference.onnx` searches without PyTorch.

Keys and values of all layers are one tensor (layers, 2, ..., heads, length, head width). The decoder step takes those
of the image or question one by one, since a graph copies what it cuts out of a tensor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer
from torch import nn
from torch.export import Dim

from data.text import PUNCTUATION
from data.transforms import MEAN, STD
from files import write_json, write_whole
from inference.loading import load
from inference.predictor import MAX_WORDS, Predictor
from inference.tasks import CAPTION_DEFAULTS, Captioner
from models.attention import Projection, merge_heads
from models.blip_vqa import MAX_QUESTION_TOKENS
from models.med import TextDecoder, TextTransformer
from utils import UserError

ANSWER_DEFAULTS = {"max_length": 10, "min_length": 1, "num_beams": 3}  # as `BLIP_VQA.generate_answers`
WHOLE = ("caption", "vqa")
Value = torch.Tensor | list[torch.Tensor]
Graph = tuple[nn.Module, dict[str, tuple[Value, Sequence[int]]], list[str]]  # inputs with dynamic dimensions


class ImageKeys(nn.Module):
    """Images (batch, 3, H, W) to keys and values of a text transformer (layers, 2, batch, heads, tokens, width)."""

    def __init__(self, visual_encoder: nn.Module, text: TextTransformer):
        super().__init__()
        self.visual_encoder, self.text = visual_encoder, text

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Encode and project."""
        return stack(self.text.project(self.visual_encoder(image)))


class QuestionKeys(nn.Module):
    """Questions (batch, length), one for each image, and image keys to keys and values of the decoder."""

    def __init__(self, encoder: TextTransformer, decoder: TextTransformer):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, input_ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Encode and project."""
        projection = Projection([[(key, value)] for key, value in keys.unbind()])
        return stack(self.decoder.project(self.encoder(input_ids, None, projection)))


class DecoderStep(nn.Module):
    """New tokens of texts, what the cache holds of them, and keys to the logits of the next token."""

    def __init__(self, decoder: TextDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: torch.Tensor, cache: torch.Tensor, keys: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (sources, readers, vocabulary), and the cache with the new positions.

        Args:
            input_ids: int64 (sources, readers, new): the new tokens of each text of each source.
            cache: (layers, 2, sources, readers, heads, past, head width).
            keys: of each layer keys and values, each (sources, heads, length, head width).
        """
        sources, readers, new = input_ids.shape
        past, bert, held = cache.shape[5], self.decoder.bert, []
        positions = torch.arange(past, past + new)
        mask = torch.arange(past + new) <= positions[:, None]
        hidden = bert.embeddings(input_ids.flatten(0, 1), positions)  # (rows, new, width)
        for layer, old, *read in zip(bert.encoder.layer, cache.unbind(), keys[::2], keys[1::2], strict=True):
            own, cross = layer.attention, layer.crossattention
            fresh = own.self.key_value(hidden)
            key, value = (torch.cat((x.flatten(0, 1), y), dim=2) for x, y in zip(old.unbind(), fresh, strict=True))
            query = own.self.split(own.self.query(hidden))
            hidden = own.output(merge_heads(attend(query, key, value, mask)), hidden)
            query = cross.self.query(hidden).reshape(sources, readers * new, hidden.shape[2])  # as `attention.fold`
            context = merge_heads(attend(cross.self.split(query), *read))
            hidden = cross.output(context.reshape(hidden.shape), hidden)
            hidden = layer.output(layer.intermediate(hidden), hidden)
            held.append(torch.stack((key, value)))
        logits = self.decoder.logits(hidden[:, -1])
        return logits.unflatten(0, (sources, readers)), torch.stack(held).unflatten(2, (sources, readers))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend as `scaled_dot_product_attention`, whose export scales keys, which copies the image's at every token."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def stack(projection: Projection) -> torch.Tensor:
    """Return the keys and values of a projection in one tensor."""
    return torch.stack([torch.stack(sets[0]) for sets in projection.layers])


def graphs(model: Predictor) -> dict[str, Graph]:
    """Return the graphs of a captioner or an answerer, each with example inputs and the names of its outputs."""
    net, of_captions = model.model, isinstance(model, Captioner)
    reader = net.text_decoder.bert if of_captions else net.text_encoder
    image = torch.zeros(2, 3, model.image_size, model.image_size)
    keys = ImageKeys(net.visual_encoder, reader)(image)
    found: dict[str, Graph] = {"image": (ImageKeys(net.visual_encoder, reader), {"image": (image, (0,))}, ["keys"])}
    if not of_captions:
        ids = torch.full((2, 5), 5)
        inputs = {"input_ids": (ids, (0, 1)), "keys": (keys, (2,))}
        module = QuestionKeys(net.text_encoder, net.text_decoder.bert)
        found["question"] = (module, inputs, ["decoder_keys"])
        keys = module(ids, keys)
    layers, _, _, heads, _, width = keys.shape
    inputs = {
        "input_ids": (torch.full((2, 3, 4), 5), (0, 1, 2)),
        "cache": (torch.zeros(layers, 2, 2, 3, heads, 6, width), (2, 3, 5)),
        "keys": ([*keys.flatten(0, 1)], (0,) if of_captions else (0, 2)),
    }
    found["decoder"] = (DecoderStep(net.text_decoder), inputs, ["logits", "new_cache"])
    return found


@torch.no_grad()
def export_whole(source: str, task: str, folder: Path, allow_pickle: bool = False, int8: bool = False) -> None:
    """Write the graphs of a checkpoint for "caption" or "vqa", its settings and its tokenizer.

    `int8` stores weights in 8 bits, a scale for each output, and computes products in 8 bits.

    Raises:
        UserError: the checkpoint does not fit the task, or a package of the ONNX export is missing.
    """
    model = load(task, source, "cpu", allow_pickle=allow_pickle, cpu_products="torch")
    vocab_file = model.model.text_config.vocab_file
    if "resample" in model.pixels or (vocab_file and Path(vocab_file).is_dir()):
        raise UserError(f"{source} has a tokenizer or resampling of its own, which the ONNX runner does not follow")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (module, inputs, outputs) in graphs(model).items():
        shapes, values, names = {}, tuple(value for value, _ in inputs.values()), []
        for key, (value, sizes) in inputs.items():
            shape = dict.fromkeys(sizes, Dim.DYNAMIC)
            shapes[key] = [shape] * len(value) if isinstance(value, list) else shape
            names += [f"{key}_{i}" for i in range(len(value))] if isinstance(value, list) else [key]
        try:
            torch.onnx.export(
                module.eval(), values, folder / f"{name}.onnx", input_names=names, output_names=outputs,
                dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
        except ImportError as error:
            raise UserError(f"ONNX needs packages that are absent ({error}); pip install onnx onnxscript") from None
        if int8:
            quantize(folder / f"{name}.onnx")
    write_json(folder / "settings.json", settings(model))
    with write_whole(folder / "tokenizer.json") as file:
        file.write(tokenizer_of(model.model.tokenizer).to_str())


def quantize(path: Path) -> None:
    """Quantize a graph's weights to 8 bits in place, and activations as they come; needs onnxruntime."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise UserError(f"int8 needs a package that is absent ({error}); pip install onnxruntime") from None
    whole = path.rename(path.with_suffix(".float32"))
    quantize_dynamic(whole, path, weight_type=QuantType.QUInt8, per_channel=True)  # signed sums saturate on AVX2
    whole.unlink()


def settings(model: Predictor) -> dict[str, Any]:
    """Return what the runner needs to know."""
    net, tokenizer = model.model, model.model.tokenizer
    found = {
        "task": "vqa", "image_size": model.image_size, "prompt": "",
        "mean": model.pixels.get("image_mean", MEAN), "std": model.pixels.get("image_std", STD),
        "prompt_ids": [tokenizer.bos_token_id], "end_id": tokenizer.sep_token_id, "enc_id": tokenizer.enc_token_id,
        "special_ids": sorted(tokenizer.all_special_ids), "deleted": PUNCTUATION, "max_words": MAX_WORDS,
        "max_question_tokens": MAX_QUESTION_TOKENS, "generation": ANSWER_DEFAULTS,
    }  # fmt: skip
    if isinstance(model, Captioner):
        ids = tokenizer(net.prompt).input_ids
        found |= {"task": "caption", "prompt": net.prompt, "prompt_ids": [tokenizer.bos_token_id, *ids[1:-1]]}
        found["generation"] = {name: model.setting(name, None) for name in CAPTION_DEFAULTS}
    return found


def tokenizer_of(tokenizer: Any) -> BertWordPieceTokenizer:
    """Return the same tokenizer for the package tokenizers alone."""
    added = ["[DEC]", "[ENC]"]
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    found = BertWordPieceTokenizer(vocabulary, lowercase=True)
    found.add_special_tokens(added)
    assert found.get_vocab() == tokenizer.get_vocab()
    return found
