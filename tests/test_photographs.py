"""Real photographs as own data: any images and text ids, by configuration alone."""

import json

from scripts import TINY, run_here, settings

from demo.photographs import CAPTIONS, write_photographs


def test_photographs_train_and_evaluate(tmp_path):
    config = write_photographs(tmp_path / "photos")
    tiny = [part for value in TINY for part in ("--set", value)]
    small = settings(med_config="{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}", java="false")
    more = settings(batch_size=8, max_length=8, num_beams=2)
    out = tmp_path / "out"
    code, told = run_here("train_caption.py", "--config", config, "--output_dir", out, *tiny, *small, *more)
    assert code == 0, told
    results = json.loads((tmp_path / "out/result/val_epoch0.json").read_text())
    assert {row["image_id"] for row in results} == {name.split("/")[1].split(".")[0] for name in CAPTIONS}
