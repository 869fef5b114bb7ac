"""Configurations: values, overrides, and the message of every mistake."""

from pathlib import Path

import pytest

from launch import config as c
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
    "nlvr": c.NLVRConfig,
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
    "nlvr": c.NLVRConfig,
    "nocaps": c.NoCapsConfig,
    "pretrain": c.PretrainConfig,
}


@pytest.mark.parametrize("name", MINIATURE)
def test_miniature_configs_read_and_share_a_model(name):
    config = c.load_config(MINIATURE[name], CONFIGS / "miniature" / f"{name}.yaml")
    assert config.vit == {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 16}
    assert config.med_config == "configs/miniature/med_config.json"


@pytest.mark.parametrize("name", TASKS)
def test_released_configs_read(name):
    config = c.load_config(TASKS[name], CONFIGS / f"{name}.yaml")
    assert config.vit == ("large" if name.endswith("large") else "base")


def test_every_config_has_a_task():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*TASKS, "capfilt"}
    assert {path.stem for path in (CONFIGS / "miniature").glob("*.yaml")} == {*MINIATURE, "capfilt"}


def test_capfilt_configs_read():
    for folder in (CONFIGS, CONFIGS / "miniature"):
        assert c.load_config(c.CapFiltConfig, folder / "capfilt.yaml").threshold == 0.5


def test_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 3\ninit_lr: 1\nvit: {embed_dim: 8, depth: 1}\nprompt:\n")
    config = c.load_config(c.CaptionConfig, path, ["vit.depth=4", "amp=bf16", "init_lr=1e-3"])
    assert (config.batch_size, config.init_lr, config.amp, config.prompt) == (3, 1e-3, "bf16", "")
    assert config.vit == {"embed_dim": 8, "depth": 4}
    c.save_config(config, tmp_path / "b.yaml")
    assert c.load_config(c.CaptionConfig, tmp_path / "b.yaml") == config


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
        c.load_config(c.CaptionConfig, path, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_config():
    with pytest.raises(UserError, match="config nowhere.yaml does not exist.*caption_coco.yaml"):
        c.load_config(c.CaptionConfig, "nowhere.yaml")


def test_every_key_is_described():
    for config_class in set(TASKS.values()):
        assert all(len(line.split()) > 3 for line in c.describe(config_class))
