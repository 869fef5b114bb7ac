"""Precision of products: TF32 on GPUs unless it is switched off, and mixed precision by the setting `amp`."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from eval_retrieval_video import encode_video
from launch.config import NLVRConfig
from launch.run import launch
from models import precision
from utils import UserError, note_once

CPU = torch.device("cpu")
CONFIG = "configs/miniature/nlvr.yaml"


@pytest.fixture(autouse=True)
def unchanged():
    note_once.cache_clear()
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.parametrize("setting, expected", [("", True), ("tf32=false", False), ("tf32=true", True)])
def test_17_2_scripts_allow_tf32(tmp_path, monkeypatch, setting, expected):
    torch.backends.cuda.matmul.allow_tf32 = not expected
    seen = []
    words = ["train_nlvr.py", "--output_dir", str(tmp_path), *(["--set", setting] if setting else [])]
    monkeypatch.setattr(sys, "argv", words)
    main = lambda config, run: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))  # noqa: E731
    assert launch(main, NLVRConfig, CONFIG, "output", "test") == 0
    assert seen == [(expected, expected)]


def test_bfloat16_is_noted_once_where_it_is_slow(monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device_type: False)
    for _ in range(2):
        with precision.autocast("bf16", CPU):
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16
    captured = capsys.readouterr()
    assert captured.err.count("amp: bf16 is slower than float32 here") == 1 and not captured.out


def test_auto_chooses_by_the_device(monkeypatch, capsys):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device_type, fast=fast: fast)
        with precision.autocast("auto", CPU):
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == dtype
    assert not capsys.readouterr().err


def test_other_settings():
    assert isinstance(precision.autocast("", CPU), nullcontext)
    assert isinstance(precision.has_bfloat16("cpu"), bool)
    with pytest.raises(UserError, match="amp is 'int8'; expected 'bf16', 'fp16', 'auto', or '' for float32"):
        precision.autocast("int8", CPU)


def test_features_of_clips_are_float32_also_under_autocast():
    embeds, projection = torch.randn(4, 5, 48), torch.nn.Linear(48, 16)
    model = SimpleNamespace(visual_encoder=lambda video: embeds, vision_proj=projection)
    expected = torch.nn.functional.normalize(projection(embeds[:, 0]).unflatten(0, (2, 2)).mean(dim=1), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, feature = encode_video(model, torch.zeros(2, 2, 3, 4, 4))
    torch.testing.assert_close(feature, expected)
    assert torch.equal(tokens, embeds.reshape(2, 10, 48))
