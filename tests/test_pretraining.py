"""Lists of pairs on disk, the schedule of pretraining, and the alarms of a training gone astray."""

import json
import os

import pytest
import torch
from PIL import Image

import pretrain
from data.pretrain import PairDataset, build_index, index_folder, list_turns, open_lists
from data.transforms import test_transform as plain_transform
from launch.config import PretrainConfig
from launch.run import Run
from training.progress import Progress
from utils import UserError

ROWS = [{"image": f"{i}.jpg", "caption": f"Text {i}, é [x], {{y}}"} for i in range(40)]


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:30], indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[30:]))
    return tmp_path


def test_lists_are_indexed_once_and_again_when_they_change(lists, capsys):
    pairs = open_lists([lists / "a.json", lists / "b.jsonl"])
    assert [len(p) for p in pairs] == [30, 10]
    assert pairs[0][7] == ("7.jpg", "Text 7, é [x], {y}") and pairs[1][9] == ("39.jpg", "Text 39, é [x], {y}")
    assert "indexing a.json" in capsys.readouterr().err
    assert open_lists([lists / "a.json"])[0][29][0] == "29.jpg" and capsys.readouterr().err == ""
    first = index_folder(lists / "a.json")
    (lists / "a.json").write_text(json.dumps(ROWS[:3]))
    assert len(open_lists([lists / "a.json"])[0]) == 3 and index_folder(lists / "a.json") != first


def test_an_index_that_another_run_finishes_first_is_used(lists):
    path = lists / "a.json"
    folder = index_folder(path)
    for _ in range(2):
        build_index(path, folder)
    assert len(open_lists([path])[0]) == 30 and not list(lists.glob("*.part*"))


def test_entries_are_read_across_chunks(lists, monkeypatch):
    monkeypatch.setattr("data.pretrain.CHUNK", 40)
    assert [open_lists([lists / "a.json"])[0][i][0] for i in range(30)] == [row["image"] for row in ROWS[:30]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "a.jpg"}]', "entry 0: has .*image.*; expected the keys 'image' .or 'url'. and 'caption'"),
        ('[{"image": "a", "caption": "b"}, {"image": ', "what follows entry 0 cannot be read"),
        ("[]", "holds no pairs"),
        ("no json", "cannot be read"),
    ],
)
def test_mistakes_in_lists(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_lists([tmp_path / "a.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_turns_and_replacements(lists):
    for i in range(40):
        if i != 4:
            Image.new("RGB", (16, 16), (i, 0, 0)).save(lists / f"{i}.jpg")
    (lists / "turns").mkdir()
    for name, rows in (("0.json", ROWS[30:33]), ("1.json", ROWS[33:35])):
        (lists / "turns" / name).write_text(json.dumps(rows))
    turns = list_turns(str(lists / "turns"))
    data = PairDataset([lists / "a.json"], str(lists), plain_transform(16), turns)
    assert len(data) == 33  # the list and the longest turn
    assert [data.pair(epoch, 32)[0] for epoch in range(3)] == ["32.jpg", "33.jpg", "32.jpg"]
    item = data.at(0, 4)
    assert "4.jpg" in item["bad"] and item["image"].shape == (3, 16, 16) and item["caption"] != "text 4, é [x], {y}"
    assert data.at(0, 5)["bad"] == "" and data.at(0, 5)["caption"] == "text 5, é [x], {y}"
    with pytest.raises(UserError, match="holds no .json"):
        list_turns(str(lists / "nowhere"))
    for i in range(40):
        (lists / f"{i}.jpg").unlink(missing_ok=True)
    with pytest.raises(UserError, match="images in a row cannot be read"):
        data.at(0, 0)


def test_index_goes_to_the_cache_where_the_folder_cannot_be_written(lists, monkeypatch):
    monkeypatch.setenv("BLIP_CACHE", str(lists / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert index_folder(lists / "a.json").parent == lists / "cache" / "index"
    assert len(open_lists([lists / "a.json"])[0]) == 30


def test_schedule():
    config = PretrainConfig(init_lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=3000, lr_decay_rate=0.9)
    places = [Progress(10, 20, epoch, step=step) for epoch, step in ((0, 0), (0, 3000), (2, 0))]
    rates = [pretrain.schedule(config, progress) for progress in places]
    assert rates == pytest.approx([1e-6, 3e-4, 3e-4 * 0.81])


def watch(temperature):
    model = torch.nn.Module()
    model.temp = torch.nn.Parameter(torch.tensor(temperature))
    return pretrain.Watch(model)


def test_a_matching_loss_that_stays_at_chance_is_told_once(tmp_path):
    alarm = watch(0.07)
    told = [alarm({"loss_itm": 0.637}, Progress(10**6, 1, step=step)) for step in range(50, 2050, 50)]
    run = Run(tmp_path, torch.device("cpu"))
    for text in filter(None, told):
        run.note(text)
    assert len(run.notes) == 1 and "has stayed at 0.6365" in run.notes[0]
    assert not any(watch(0.07)({"loss_itm": 0.5}, Progress(10**6, 1, step=step)) for step in range(0, 3000, 50))


def test_a_temperature_at_its_clamp_is_told():
    assert "temperature 0.5 is at its clamp" in watch(0.5)({"loss_itm": 0.4}, Progress(10, 1))
    assert watch(0.07)({"loss_itm": 0.4}, Progress(10, 1)) == ""
