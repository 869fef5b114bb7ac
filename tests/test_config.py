"""Configurations: values, overrides, and the message of every mistake."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from launch import config as c
from launch.settings_file import check_ranges, load_config, save_config
from models.med_config import load_med_config
from models.vit import VARIANTS, vit_sizes
from utils import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = {
    "caption_coco": c.CaptionConfig,
    "caption_coco_large": c.CaptionConfig,
    "nocaps": c.NoCapsConfig,
    "nocaps_large": c.NoCapsConfig,
    "retrieval_coco": c.RetrievalConfig,
    "retrieval_coco_large": c.RetrievalConfig,
    "retrieval_flickr": c.RetrievalConfig,
    "retrieval_flickr_large": c.RetrievalConfig,
    "retrieval_msrvtt": c.VideoConfig,
    "vqa": c.VQAConfig,
    "okvqa": c.VQAConfig,
    "msrvtt_qa": c.VideoQAConfig,
    "msvd_qa": c.VideoQAConfig,
    "nlvr": c.NLVRConfig,
    "snli_ve": c.ClassificationConfig,
    "visdial": c.DialogueConfig,
    "pretrain": c.PretrainConfig,
    "pretrain_large": c.PretrainConfig,
}


MINIATURE = {
    "caption": c.CaptionConfig,
    "caption_finetune": c.CaptionConfig,
    "retrieval": c.RetrievalConfig,
    "retrieval_msrvtt": c.VideoConfig,
    "vqa": c.VQAConfig,
    "easy_vqa": c.VQAConfig,
    "video_qa": c.VideoQAConfig,
    "nlvr": c.NLVRConfig,
    "nocaps": c.NoCapsConfig,
    "classification": c.ClassificationConfig,
    "dialogue": c.DialogueConfig,
    "aokvqa": c.VQAConfig,
    "gqa": c.VQAConfig,
    "okvqa": c.VQAConfig,
    "pretrain": c.PretrainConfig,
}


@pytest.mark.parametrize("name", MINIATURE)
def test_miniature_configs_read_and_share_a_model(name):
    config = load_config(MINIATURE[name], CONFIGS / "miniature" / f"{name}.yaml")
    assert config.vit == {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 16}
    assert config.med_config == "configs/miniature/med_config.json"


@pytest.mark.parametrize("name", TASKS)
def test_released_configs_read(name):
    config = load_config(TASKS[name], CONFIGS / f"{name}.yaml")
    assert config.vit == ("large" if name.endswith("large") else "base")


def test_every_config_has_a_task():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*TASKS, "capfilt"}
    assert {path.stem for path in (CONFIGS / "miniature").glob("*.yaml")} == {*MINIATURE, "capfilt"}


def test_capfilt_configs_read():
    for folder in (CONFIGS, CONFIGS / "miniature"):
        assert load_config(c.CapFiltConfig, folder / "capfilt.yaml").threshold == 0.5


def test_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 3\ninit_lr: 1\nvit: {embed_dim: 8, depth: 1}\nprompt:\n")
    config = load_config(c.CaptionConfig, path, ["vit.depth=4", "amp=bf16", "init_lr=1e-3"])
    assert (config.batch_size, config.init_lr, config.amp, config.prompt) == (3, 1e-3, "bf16", "")
    assert config.vit == {"embed_dim": 8, "depth": 4}
    save_config(config, tmp_path / "b.yaml")
    assert load_config(c.CaptionConfig, tmp_path / "b.yaml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("batch_size: 3\nbacth_size: 4", [], "a.yaml, line 2: unknown key 'bacth_size'; did you mean 'batch_size'?"),
        ("init_lr: fast", [], "a.yaml, line 1: init_lr is a text ('fast'); expected a number"),
        ("\nmax_epoch: 1.5", [], "a.yaml, line 2: max_epoch is a number (1.5); expected a whole number"),
        ("compile: 1", [], "a.yaml, line 1: compile is a whole number (1); expected true or false"),
        ("- 1", [], "a.yaml holds a list; expected lines of 'key: value'"),
        ("a: [", [], "a.yaml, line 1: not YAML"),
        ("batch_size: 1\nbatch_size: 2", [], "line 2: not YAML (found duplicate key"),
        ("", ["batch_size"], "--set got 'batch_size'; expected key=value"),
        ("", ["batch_size.x=1", "batch_size=x"], "--set batch_size=x: batch_size is a text ('x')"),
        ("vit: base", ["vit.depth=1"], "vit is a text ('base'), not a mapping; set vit as a whole"),
    ],
)
def test_mistakes(tmp_path, text, overrides, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(c.CaptionConfig, path, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_config():
    with pytest.raises(UserError, match="config nowhere.yaml does not exist.*caption_coco.yaml"):
        load_config(c.CaptionConfig, "nowhere.yaml")


def test_every_key_is_described():
    for config_class in set(TASKS.values()):
        assert all(len(line.split()) > 3 for line in c.describe(config_class))


# 18.C: every number's range


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval_every=0", "eval_every is 0; expected a number >= 1"),
        ("log_every=0", "log_every is 0; expected a number >= 1"),
        ("grad_accum=0", "grad_accum is 0; expected a number >= 1"),
        ("batch_size=-1", "batch_size is -1; expected a number >= 1"),
        ("num_beams=0", "num_beams is 0; expected a number >= 1"),
        ("num_workers=-2", "num_workers is -2; expected a number >= 0"),
        ("init_lr=.nan", "init_lr is nan; expected a number >= 0"),
        ("clip_grad=.inf", "clip_grad is inf; expected a number >= 0"),
        ("max_epoch=0", "max_epoch is 0; expected a number >= 1"),
        ("min_length=30", "min_length is 30 and max_length 20; raise max_length"),
        ("max_length=3", "min_length is 5 and max_length 3; raise max_length"),
        ("amp=bf32", "amp is 'bf32'; expected one of '', 'bf16', 'fp16', 'auto'"),
        ("schedule=cosine", "schedule is 'cosine'; expected one of 'epoch', 'step'"),
        ("parallel=zero", "parallel is 'zero'; expected one of 'ddp', 'fsdp'"),
        ("grad_ckpt=deepspeed", "grad_ckpt is 'deepspeed'; expected one of 'torch', 'fairscale'"),
        ("adapter_rank=-1", "adapter_rank is -1; expected a number >= 0"),
    ],
)
def test_18_c_values_out_of_range(tmp_path, override, message):
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(UserError) as error:
        load_config(c.CaptionConfig, tmp_path / "a.yaml", [override])
    assert str(error.value) == f"--set {override}: {message}"


@pytest.mark.parametrize("value", ["0", "-0.1", "1.01", ".nan", "-.inf"])
def test_18_c_a_share_of_probability(tmp_path, value):
    (tmp_path / "a.yaml").write_text(f"top_p: {value}")
    with pytest.raises(UserError, match="a.yaml, line 1: top_p is .*; expected a number > 0 and <= 1"):
        load_config(c.CapFiltConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize("config_class", [*dict.fromkeys(TASKS.values()), c.CapFiltConfig])
def test_18_c_every_number_has_a_range_and_its_default_is_in_it(config_class):
    config = config_class()
    check_ranges(config, {})
    for item in fields(config):
        value = config[item.name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert item.metadata["allowed"]
            for wrong in (float("nan"), float("inf"), -1, 10**400):
                with pytest.raises(UserError):
                    check_ranges(replace(config, **{item.name: wrong}), {})


def test_items_of_lists_are_texts(tmp_path):
    (empty := tmp_path / "empty.yaml").write_text("")
    assert load_config(c.ClassificationConfig, empty, ["classes=[0, 1.5, cat]"]).classes == ["0", "1.5", "cat"]
    for key, value in (("classes", "[true]"), ("classes", "[[a]]"), ("train_file", "[null]"), ("freeze", "[{a: b}]")):
        kind = c.PretrainConfig if key == "train_file" else c.ClassificationConfig
        with pytest.raises(UserError, match=f"--set .*: {key} holds .*; expected texts"):
            load_config(kind, empty, [f"{key}={value}"])


@pytest.mark.parametrize("values", [
    {"hidden_size": "768"}, {"hidden_size": True}, {"num_hidden_layers": 1.5}, {"num_attention_heads": 0},
    {"hidden_dropout_prob": 2}, {"layer_norm_eps": float("nan")}, {"vocab_file": 3}, {"hidden_act": ["gelu"]},
])  # fmt: skip
def test_values_of_the_text_transformer(values):
    with pytest.raises(UserError, match=f"med_config: {next(iter(values))} is .*; expected a"):
        load_med_config(values)


@pytest.mark.parametrize("content", [b"[]", b"3", b"{", b"{}\xff"])
def test_files_of_the_text_transformer(tmp_path, content):
    (tmp_path / "med.json").write_bytes(content)
    with pytest.raises(UserError, match="med.json (is not JSON|holds a (list|int); expected an object)"):
        load_med_config(tmp_path / "med.json")


@pytest.mark.parametrize("change", [
    {"embed_dim": "wide"}, {"depth": None}, {"num_heads": 5}, {"num_heads": 0}, {"patch_size": -16},
    {"mlp_width": "wide"}, {"layer_norm_eps": []}, {"depth": float("inf")},
])  # fmt: skip
def test_sizes_of_the_image_encoder(change):
    with pytest.raises(UserError, match="whole numbers above 0, and num_heads divides embed_dim"):
        vit_sizes(VARIANTS["tiny"] | change)
    assert vit_sizes(VARIANTS["tiny"] | {"mlp_width": 32}) == VARIANTS["tiny"] | {"mlp_width": 32}
