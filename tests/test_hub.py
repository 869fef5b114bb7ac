"""Folders in transformers' format: what they say is followed, with the outputs of transformers itself, or refused."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipModel,
    GenerationConfig,
)

import convert as command
from data.transforms import STD
from data.transforms import test_transform as square
from demo.photographs import CAPTIONS
from formula import arr
from inference import load
from models.architecture import settings_of
from models.blip import BLIP_Base, blip_decoder, blip_feature_extractor
from models.blip_itm import blip_itm
from models.export import write_checkpoint, write_huggingface
from models.pretrained import load_pretrained
from utils import UserError, note_once, run_command

try:  # transformers 5 has it, transformers 4 uses Pillow anyway
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
except ImportError:
    BlipImageProcessorPil = BlipImageProcessor

ROOT = Path(__file__).parent.parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GERMAN = [*SPECIAL, "ein", "Hund", "hund", "auf", "dem", "Dach", "dach", "##es", "grün", "grun", "gru", "##n", ",", "A"]
TEXTS = ["Ein Hund, auf dem Daches", "GRÜN hund"]
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, image_size=32)
IMAGES = arr("a:hub", (2, 3, 32, 32))


@pytest.fixture(autouse=True)
def notes_anew():
    note_once.cache_clear()


def bert_tokenizer(tokens, **flags):
    if int(transformers.__version__.split(".")[0]) >= 5:
        return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **flags)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(f"{token}\n" for token in tokens))
        file.flush()
        return transformers.BertTokenizerFast(vocab_file=file.name, **flags)


def make(folder, kind=BlipForConditionalGeneration, text=None, vision=None, words=None, **processor):
    """Save a random model, with a processor and a vocabulary of its own where they are given; returns the model."""
    text = TEXT | (text or {})
    if words:
        tokenizer = bert_tokenizer(GERMAN, **words)
        tokenizer.save_pretrained(folder)
        ids = dict(vocab_size=len(GERMAN) + 2, bos_token_id=len(GERMAN), sep_token_id=3, eos_token_id=3)
        text = ids | text
    config = BlipConfig(text_config=text, vision_config=VISION | {"patch_size": 16} | (vision or {}))
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if processor:
        BlipImageProcessor(**{"size": {"height": 32, "width": 32}, **processor}).save_pretrained(folder)
    return model


def change(folder, name, **values):
    """Change values of a JSON file; of a part, such as text_config, where the value is an object."""
    path = Path(folder, name)
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in values.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def ours(folder, prefix="hf:"):
    return load("caption", f"{prefix}{folder}", prompt="")


def logits_of(model, ids):
    decoder = model.text_decoder
    projection = decoder.bert.project(model.visual_encoder(IMAGES))
    return decoder.logits(decoder.hidden_states(ids, projection=projection))


@torch.no_grad()
def check_captioner(folder, theirs, size=(32, 32)):
    """Compare tokens, logits and pixels with transformers'."""
    own = ours(folder)
    if Path(folder, "tokenizer_config.json").exists() or Path(folder, "tokenizer.json").exists():
        expected = AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids
        assert own.model.tokenizer(TEXTS).input_ids == expected
    ids = torch.tensor([[theirs.config.text_config.bos_token_id, 5, 6, 7, 3]] * 2)
    found, expected = logits_of(own.model, ids), theirs(pixel_values=IMAGES, input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if any(Path(folder, name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        pixels = BlipImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
        pixels = pixels.float()
        least = 1e-6 * max(10.0, float(pixels.abs().max()))  # values of an unusual scale reach to 2550
        torch.testing.assert_close(own.transform(image)[None], pixels, rtol=1e-5, atol=least)


ACTS = st.sampled_from(["gelu", "relu", "gelu_new", "quick_gelu", "silu"])
EPS = st.sampled_from([1e-12, 1e-6, 1e-5, 1e-2])
CASES = st.fixed_dictionaries({
    "text": st.fixed_dictionaries({"num_attention_heads": st.sampled_from([1, 2, 4, 8]), "hidden_act": ACTS,
                                   "layer_norm_eps": EPS, "num_hidden_layers": st.integers(1, 2)}),
    "vision": st.fixed_dictionaries({"num_attention_heads": st.sampled_from([1, 2, 3]), "hidden_act": ACTS,
                                     "layer_norm_eps": EPS, "intermediate_size": st.integers(20, 60)}),
    "words": st.none() | st.fixed_dictionaries({"do_lower_case": st.booleans(), "strip_accents": st.booleans()}),
    "image_mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
    "image_std": st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
    "resample": st.integers(0, 5),
    "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 1.0]),
    "do_normalize": st.booleans(),
    "do_rescale": st.booleans(),
})  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, size=st.tuples(st.integers(8, 70), st.integers(8, 70)), binary=st.booleans())
def test_d1_any_configuration_gives_transformers_outputs(case, size, binary):
    with tempfile.TemporaryDirectory() as folder:
        theirs = make(folder, **case)
        if binary:
            to_bin(Path(folder))
        check_captioner(folder, theirs, size)


ODD = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(["x", "", [], {}, [1], [0, 0, 0]])
NAMES = {
    "config.json": ["text_config", "vision_config", "projection_dim", "prompt", "model_type"],
    "text_config": [*TEXT, "hidden_act", "vocab_size", "bos_token_id", "layer_norm_eps", "hidden_dropout_prob"],
    "vision_config": [*VISION, "hidden_act", "layer_norm_eps"],
    "preprocessor_config.json": ["size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize",
                                 "do_rescale", "do_normalize", "do_center_crop"],
    "generation_config.json": ["max_length", "num_beams", "top_p"],
    "model.safetensors.index.json": ["weight_map"],
}  # fmt: skip
DAMAGES = {name: st.dictionaries(st.sampled_from(keys), ODD, max_size=2) for name, keys in NAMES.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(damages=st.fixed_dictionaries(DAMAGES))
def test_d1_odd_values_are_read_or_refused_in_one_line(whole, damages):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        if damages["model.safetensors.index.json"]:
            Path(folder, "model.safetensors").rename(Path(folder, "model-1.safetensors"))
        for part in ("text_config", "vision_config"):
            change(folder, "config.json", **{part: damages[part]})
        for name in [name for name in damages if name.endswith(".json")]:
            path, values = Path(folder, name), damages[name]
            if values:
                path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
        try:
            arguments, _ = settings_of(f"hf:{folder}")
            load_pretrained(blip_decoder(**arguments), f"hf:{folder}", "caption")
        except UserError as error:
            assert str(error) and "\n" not in str(error)


def to_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_d1_heads_of_the_file_are_followed_with_a_warning_and_a_switch_for_old_files(tmp_path, capsys):
    sizes = dict(hidden_size=48, num_attention_heads=8)
    theirs = make(tmp_path, text=sizes, vision={"layer_norm_eps": 1e-5})
    check_captioner(tmp_path, theirs)
    said = capsys.readouterr().err
    assert "says num_attention_heads 8, which is followed; the released models have 12" in said
    assert "says layer_norm_eps 1e-05" in said
    old = ours(tmp_path, "hf-released:").model
    assert old.text_config.num_attention_heads == 12 and old.visual_encoder.blocks[0].norm1.eps == 1e-6
    assert "num_attention_heads" not in capsys.readouterr().err


def test_d1_twelve_heads_need_no_warning(tmp_path, capsys):
    make(tmp_path, text=dict(hidden_size=48, num_attention_heads=12), vision={"layer_norm_eps": 1e-6})
    capsys.readouterr()
    assert settings_of(f"hf:{tmp_path}")[0]["med_config"]["num_attention_heads"] == 12
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("files", ["all", "tokenizer.json", "vocab.txt"])
def test_d1_another_vocabulary_is_used(tmp_path, files, lower):
    theirs = make(tmp_path, words={"do_lower_case": lower})
    if files == "tokenizer.json":
        (tmp_path / "tokenizer_config.json").unlink()
        if not lower:  # transformers does not read this in tokenizer.json
            with pytest.raises(UserError, match="splits texts otherwise than transformers'"):
                ours(tmp_path)
            return
    if files == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in GERMAN), encoding="utf-8")
    check_captioner(tmp_path, theirs)
    tokens = ours(tmp_path).model.tokenizer.tokenize("Hund Dach")
    assert tokens == (["hund", "dach"] if lower else ["Hund", "Dach"])


def test_d1_a_cased_vocabulary_of_berts_size_is_used(tmp_path):
    """Its number of entries alone does not tell it from the released one."""
    make(tmp_path, text=dict(vocab_size=30524))
    vocabulary = (ROOT / "configs" / "bert-base-uncased-vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    vocabulary[2000:2002] = ["Cat", "Äpfel"]
    bert_tokenizer(vocabulary, do_lower_case=False).save_pretrained(tmp_path)
    assert ours(tmp_path).model.tokenizer.tokenize("Cat Äpfel") == ["Cat", "Äpfel"]


def test_d1_the_released_vocabulary_is_recognised(tmp_path):
    make(tmp_path)
    vocabulary = (ROOT / "configs" / "bert-base-uncased-vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    bert_tokenizer(vocabulary).save_pretrained(tmp_path)
    assert "vocab_file" not in settings_of(f"hf:{tmp_path}")[0]["med_config"]


def test_d1_more_embeddings_than_tokens(tmp_path):
    check_captioner(tmp_path, make(tmp_path, text=dict(vocab_size=64), words={"do_lower_case": True}))


def test_d1_the_processors_size_is_followed(tmp_path):
    make(tmp_path, size={"height": 48, "width": 48})
    model = ours(tmp_path)
    assert model.image_size == 48 and model.model.visual_encoder.pos_embed.shape[1] == 10
    write_checkpoint(f"hf:{tmp_path}", tmp_path / "a.safetensors")
    assert settings_of(str(tmp_path / "a.safetensors"))[0]["image_size"] == 48


def test_d1_a_processor_in_the_old_file(tmp_path):
    theirs = make(tmp_path, image_mean=[0.1, 0.2, 0.3], resample=2)
    name = "preprocessor_config.json"
    if (tmp_path / "processor_config.json").exists():
        content = json.loads((tmp_path / "processor_config.json").read_text())
        (tmp_path / name).write_text(json.dumps(content.get("image_processor", content)))
        (tmp_path / "processor_config.json").unlink()
    check_captioner(tmp_path, theirs, (40, 50))


@pytest.mark.parametrize("kind", [BlipImageProcessor, BlipImageProcessorPil])
def test_19_pixels_differ_from_transformers_as_documented(kind):
    """docs/conversion.md has the figures; values are in units of 1 of 255."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    homes = {"skimage": Path(skimage.__file__).parent / "data",
             "sklearn": Path(sklearn.__file__).parent / "datasets" / "images"}  # fmt: skip
    paths = [homes[name.split("/")[0]] / name.split("/")[1] for name in CAPTIONS]
    own, theirs = square(384), kind(size={"height": 384, "width": 384})
    images = [Image.open(path).convert("RGB") for path in paths if path.is_file()]
    pairs = [(own(image), theirs(image, return_tensors="pt")["pixel_values"][0]) for image in images]
    unit = torch.tensor(STD)[:, None, None] * 255
    difference = torch.stack([((a - b) * unit).abs().round() for a, b in pairs])
    share = (difference > 0).float().mean().item()
    print(f"\n{kind.__name__}, {len(images)} photographs: {share:.2%} differ, by {difference.max():g} at most")
    assert share < 0.01 and difference.max() <= 2 and (kind is BlipImageProcessor or share == 0)


REFUSED = {
    "another model": ("config.json", {"model_type": "blip-2"}, "model of type 'blip-2'"),
    "activation": ("config.json", {"text_config": {"hidden_act": "swoosh"}}, "hidden_act is 'swoosh'"),
    "activation of the image encoder": ("config.json", {"vision_config": {"hidden_act": "x"}}, "hidden_act is 'x'"),
    "first token": ("config.json", {"text_config": {"bos_token_id": 7}}, "says bos_token_id 7"),
    "end token": ("config.json", {"text_config": {"sep_token_id": 7}}, "says sep_token_id 7"),
    "crop": ("preprocessor_config.json", {"do_center_crop": True}, "has do_center_crop"),
    "no resizing": ("preprocessor_config.json", {"do_resize": False}, "has no do_resize"),
    "shortest edge": ("preprocessor_config.json", {"size": {"shortest_edge": 32}}, "images resized to a square"),
    "not square": ("preprocessor_config.json", {"size": {"height": 32, "width": 48}}, "resized to a square"),
    "heads": ("config.json", {"text_config": {"num_attention_heads": 5}}, "num_attention_heads 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_d1_what_is_not_followed_is_refused_by_name(tmp_path, case):
    name, values, message = REFUSED[case]
    make(tmp_path)
    change(tmp_path, name, **values)
    with pytest.raises(UserError, match=message) as error:
        ours(tmp_path)
    assert "\n" not in str(error.value)


def test_d1_a_tokenizer_of_another_kind_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    make(tmp_path)
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="splits texts otherwise than transformers'"):
        ours(tmp_path)


def test_d1_only_the_weights_that_transformers_reads_are_read(tmp_path):
    theirs = make(tmp_path)
    other = {key: value + 1 for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(other, tmp_path / "adapter.safetensors")
    save_file(other, tmp_path / "z_backup.safetensors")
    check_captioner(tmp_path, theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check_captioner(tmp_path, theirs)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="which its index names"):
        ours(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has adapter.safetensors.*z_backup.safetensors; expected model.safetensors"):
        ours(tmp_path)


def test_d1_bin_folders_are_read_without_running_code(tmp_path):
    theirs = make(tmp_path)
    to_bin(tmp_path)
    check_captioner(tmp_path, theirs)
    torch.save({"a": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="may run code"):
        ours(tmp_path)


@torch.no_grad()
def test_19_blip_model_folders_give_features(tmp_path):
    theirs = make(tmp_path, BlipModel, words={"do_lower_case": True})
    source = f"hf:{tmp_path}"
    arguments = settings_of(source)[0]
    own = blip_feature_extractor(source, **arguments).eval()
    text = own.tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens = theirs.vision_model(IMAGES).last_hidden_state
    torch.testing.assert_close(own(IMAGES, TEXTS, "image"), tokens, rtol=1e-5, atol=1e-5)
    hidden = theirs.text_model(text.input_ids, text.attention_mask).last_hidden_state
    torch.testing.assert_close(own(IMAGES, TEXTS, "text"), hidden, rtol=1e-5, atol=1e-5)
    assert {key.split(".")[0] for key in own.load_report.left_over} == {"visual_projection", "text_projection"}
    with pytest.raises(UserError, match="a features checkpoint and lacks"):
        blip_itm(source, **arguments)


def test_d1_training_refuses_what_its_model_does_not_follow(tmp_path, capsys):
    make(tmp_path, BlipForImageTextRetrieval, text={"hidden_act": "relu"}, image_mean=[0.1, 0.1, 0.1])
    arguments = settings_of(f"hf:{tmp_path}")[0]
    arguments.pop("embed_dim")
    other = dict(arguments, med_config=arguments["med_config"] | {"hidden_act": "gelu"})
    with pytest.raises(UserError, match="says hidden_act 'relu', and the model has 'gelu'"):
        load_pretrained(BLIP_Base(**other), f"hf:{tmp_path}", "features")
    other = dict(arguments, vit={k: v for k, v in arguments["vit"].items() if k != "layer_norm_eps"})
    load_pretrained(BLIP_Base(**other), f"hf:{tmp_path}", "features")
    said = capsys.readouterr().out
    assert "layer_norm_eps of vit is 1e-05 in the folder and 1e-06 here" in said and "image_mean [0.1" in said


# The other way.


def save_own(path, **config):
    model = blip_decoder(vit=dict(embed_dim=24, depth=1, num_heads=2, patch_size=16), image_size=32,
                         med_config=dict(TEXT, num_hidden_layers=1))  # fmt: skip
    sizes = {"med_config": {"num_attention_heads": 4}, "vit": {"num_heads": 2}}
    torch.save({"model": model.state_dict(), "config": sizes | config}, path)


def test_d1_to_hf_and_back_keeps_lengths_beams_and_prompt(tmp_path):
    asked = {"max_length": 17, "min_length": 4, "num_beams": 2, "prompt": "a drawing of "}
    save_own(tmp_path / "m.pth", **asked)
    write_huggingface(str(tmp_path / "m.pth"), tmp_path / "hub")
    generation = GenerationConfig.from_pretrained(tmp_path / "hub")
    assert [getattr(generation, key) for key in ("max_length", "min_length", "num_beams")] == [17, 4, 2]
    assert BlipConfig.from_pretrained(tmp_path / "hub").prompt == "a drawing of "
    _, config = settings_of(f"hf:{tmp_path / 'hub'}")
    assert {key: config[key] for key in asked} == asked
    write_checkpoint(f"hf:{tmp_path / 'hub'}", tmp_path / "back.safetensors")
    assert settings_of(str(tmp_path / "back.safetensors"))[1].items() >= asked.items()
    assert load("caption", tmp_path / "back.safetensors").model.prompt == "a drawing of "


def test_d1_odd_settings_come_back(tmp_path):
    case = dict(text={"hidden_act": "relu", "layer_norm_eps": 1e-3}, vision={"hidden_act": "silu"},
                words={"do_lower_case": False}, image_mean=[0.1, 0.2, 0.3], resample=2)  # fmt: skip
    theirs = make(tmp_path / "a", **case)
    for target in (tmp_path / "b", tmp_path / "c"):
        write_huggingface(f"hf:{tmp_path / 'a'}", target)
    check_captioner(tmp_path / "b", theirs)
    first, second = (settings_of(f"hf:{tmp_path / name}") for name in "ab")
    first[0]["med_config"].pop("vocab_file"), second[0]["med_config"].pop("vocab_file")
    assert first[0] == second[0]


def test_d1_other_settings_of_generation_are_named(tmp_path, capsys):
    make(tmp_path)
    change(tmp_path, "generation_config.json", num_beams=4, top_p=0.8, do_sample=True)
    assert ours(tmp_path).setting("num_beams", None) == 4
    assert "also has" in (said := capsys.readouterr().err) and "top_p" in said and "do_sample" in said


def test_d1_outputs_have_the_format_of_their_ending_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    source = tmp_path / "m.pth"

    def convert(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        return run_command(command.main), capsys.readouterr().err

    save_own(source)
    for ending in (".pth", ".safetensors"):
        assert convert("--to-half", source, "--output", tmp_path / f"half{ending}") == (0, "")
    assert torch.load(tmp_path / "half.pth", weights_only=True)["model"] and load_file(tmp_path / "half.safetensors")
    before = (tmp_path / "half.pth").read_bytes()
    for output, message in (
        ("half.pth", "exists; give another --output, or --overwrite"),
        ("half.bin", "--to-half writes .safetensors or .pth"),
        ("half", "--to-half writes .safetensors or .pth"),
    ):
        code, said = convert("--to-half", source, "--output", tmp_path / output)
        assert code == 2 and message in said and said.count("\n") == 1
    assert (tmp_path / "half.pth").read_bytes() == before
    assert convert("--to-half", source, "--output", tmp_path / "half.pth", "--overwrite") == (0, "")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine.txt").write_text("mine")
    assert "exists" in convert("--to-hf", source, "--output", tmp_path / "hub")[1]
    assert "writes a folder" in convert("--to-hf", source, "--output", tmp_path / "hub.pth")[1]
