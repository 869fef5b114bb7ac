"""What a folder in transformers' format says besides the weights: architecture, vocabulary, pixels, generation."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.med_config import MedConfig, create_tokenizer, read_json
from models.tokenizer import equal_tokenizers, init_tokenizer
from utils import UserError, note_once

RELEASED = {"num_attention_heads": 12, "layer_norm_eps": 1e-6}  # of texts, of images; the Hub's old files differ
FOLLOWED = (
    "num_attention_heads", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip
FOLLOWED_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")  # of an image processor
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
PIXELS = ("image_mean", "image_std", "resample")  # settings of a checkpoint, if not as in the released processor
GENERATION = ("max_length", "min_length", "num_beams")
IGNORED = ("eos", "bos", "pad", "_from_model", "output_", "use_cache", "return_dict", "transformers_version")


def settings_of_folder(folder: Path, decodes: bool, released: bool = False) -> dict[str, Any]:
    """Return the settings of a folder: "vit", "med_config", pixels and generation, as a checkpoint's configuration.

    `decodes` means that the model has a text decoder. With `released` the text transformer has 12 heads and the image
    encoder's norms 1e-6, whatever config.json says. UserError if a file cannot be read, or says what is not followed
    here.
    """
    from transformers import BlipConfig

    given = read_json(folder / "config.json")
    if given.get("model_type") != "blip":
        raise UserError(f"{folder} holds a model of type {given.get('model_type')!r}; expected 'blip'")
    with one_line(folder / "config.json"):
        config = BlipConfig.from_dict(given)
    text, vision = config.text_config, config.vision_config
    if released:
        text.num_attention_heads, vision.layer_norm_eps = RELEASED.values()
    for name, part, value in zip(RELEASED, (text, vision), RELEASED.values(), strict=True):
        if getattr(part, name) != value:
            note_once(
                f"{folder.name}/config.json says {name} {getattr(part, name)}, which is followed; the released models "
                f"have {value}, which hf-released: in place of hf: gives"
            )
    med_config = {name: getattr(text, name) for name in FOLLOWED} | vocabulary_of(folder)
    if "vocab_file" in med_config:
        med_config["num_embeddings"] = text.vocab_size
    if decodes:
        refuse_other_ids(text, med_config, folder)
    sizes = {"num_heads": vision.num_attention_heads, "hidden_act": vision.hidden_act}
    sizes["layer_norm_eps"] = vision.layer_norm_eps
    settings = {"vit": sizes, "med_config": med_config, "folder": str(folder)} | pixels_of(folder)
    return settings | generation_of(folder, given)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises about the values in a file into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has a value that is not understood ({' '.join(str(error).split())[:150]})") from None


def vocabulary_of(folder: Path) -> dict[str, Any]:
    """Return {"vocab_file": folder} if its tokenizer is not that of bert-base-uncased."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return {}
    if equal_tokenizers(init_tokenizer(folder), init_tokenizer()):
        return {}
    return {"vocab_file": str(folder.resolve())}


def refuse_other_ids(text: Any, med_config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a decoder that begins or ends texts with other tokens than [DEC] and [SEP]."""
    tokenizer = create_tokenizer(MedConfig(vocab_file=med_config.get("vocab_file", "")))
    for name, expected in (("bos_token_id", tokenizer.bos_token_id), ("sep_token_id", tokenizer.sep_token_id)):
        if getattr(text, name) != expected:
            raise UserError(
                f"{folder}/config.json says {name} {getattr(text, name)}, and its vocabulary has that token at "
                f"{expected}; correct one of them"
            )


def pixels_of(folder: Path) -> dict[str, Any]:
    """Return the processor's "processor_size", and "image_mean", "image_std" and "resample" where they are unusual."""
    path = folder / "processor_config.json"
    given = read_json(path).get("image_processor")
    if not given:
        given = read_json(path := folder / "preprocessor_config.json")
    if not given:
        return {}
    from transformers import BlipImageProcessor

    usual = normalisation(BlipImageProcessor())
    with one_line(path):
        processor = BlipImageProcessor.from_dict(given)
        size = {key: int(value) for key, value in dict(processor.size).items()}
        found = normalisation(processor)
    others = [k for k, v in given.items() if k.startswith("do_") and v and k not in FOLLOWED_STEPS]
    square = set(size) == {"height", "width"} and size["height"] == size["width"]
    if others or not processor.do_resize or not square:
        what = ", ".join(others) or ("no do_resize" if not processor.do_resize else f"size {size}")
        raise UserError(f"the processor of {folder} has {what}; expected images resized to a square, and no other step")
    return {"processor_size": size["height"]} | {key: value for key, value in found.items() if value != usual[key]}


def normalisation(processor: Any) -> dict[str, Any]:
    """Return resampling, mean and deviation, scaled if pixels are not divided by 255; ValueError if they are wrong."""
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale  # of 1 / 255
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    found = {name: [float(value) / scale for value in values] for name, values in (("mean", mean), ("std", std))}
    if len(found["mean"]) != 3 or len(found["std"]) != 3 or not all(0 < value < math.inf for value in found["std"]):
        raise ValueError(f"mean {mean} and deviation {std} of three colours")
    resample = RESAMPLE[range(len(RESAMPLE)).index(processor.resample)]
    return {"resample": resample, "image_mean": found["mean"], "image_std": found["std"]}


def generation_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lengths, beams and prompt of captions; name the other settings of generation once."""
    given = {key: value for key, value in read_json(folder / "generation_config.json").items() if value is not None}
    if others := [key for key in given if key not in GENERATION and not key.startswith(IGNORED)]:
        note_once(f"{folder.name}/generation_config.json also has {', '.join(others)}; give them with each call")
    return {key: given[key] for key in GENERATION if key in given} | (
        {"prompt": config["prompt"]} if "prompt" in config else {}
    )
