"""Precision of products: TF32 on GPUs is on unless it is switched off."""

import sys

import pytest
import torch

from launch.config import NLVRConfig
from launch.run import launch

CONFIG = "configs/miniature/nlvr.yaml"


@pytest.fixture(autouse=True)
def unchanged():
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
