"""Frozen parts and low-rank adapters: what changes, what the files hold, what continues, what is refused."""

import json
import sys
import warnings
from functools import partial

import pytest
import torch
from scripts import ROOT, run_here, settings
from test_compile import QUESTIONS, TEXTS
from torch.utils.data import DataLoader, Dataset

from data import make_loader
from formula import build as build_formula
from formula import img
from launch.config import NLVRConfig, TrainConfig
from launch.run import BEST, LAST, Run
from miniature.writing import write_miniature
from processes import run_in_processes
from training import adapters
from training.loop import Task, fit
from training.results import evaluate_only
from utils import UserError, get_rank

CPU = torch.device("cpu")
VOCAB = ROOT / "configs" / "miniature" / "vocab.txt"
build = partial(build_formula, vocab_file=VOCAB, num_layers=2)  # small, for quick checkpoints
ADAPTED = {"adapter_rank": 2, "adapter_alpha": 4.0}
IMAGE = img("adapted")
LOSSES = {
    "decoder": lambda model: model(IMAGE, [f"a picture of {text}" for text in TEXTS]),
    "vqa": lambda model: model(IMAGE, QUESTIONS, ["red", "two"], n=[1, 1], weights=torch.ones(2)),
    "nlvr": lambda model: model(torch.cat((IMAGE, IMAGE.flip(-1))), TEXTS, torch.tensor([0, 1])),
}


class Nothing(Dataset):
    """As many rows as steps are wanted."""

    def __init__(self, steps):
        self.steps = steps

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        return {}


def loader(steps) -> DataLoader:
    return make_loader(Nothing(steps), 1, True, seed=1, processes=(1, 0))


def trained(folder, kind, steps=2, epochs=1, resume=False, model=None, **values):
    """Train a tiny model without dropout for some steps; returns it."""
    folder.mkdir(exist_ok=True)
    model = model or build(kind)
    config_class = NLVRConfig if kind == "nlvr" else TrainConfig
    config = config_class(init_lr=1e-2, max_epoch=epochs, num_workers=0, **values)
    run = Run(folder, CPU)
    run.resume = folder / LAST if resume else None
    torch.manual_seed(3 + get_rank())
    fit(run, config, model, loader(steps), Task(lambda wrapped, batch, progress: {"loss": LOSSES[kind](wrapped)}))
    return model.eval()


def changed(kind, state):
    """Names of entries that are not the formula's any more."""
    start = build(kind).state_dict()
    assert list(state) == list(start), "exactly the released names, in their order"
    return {name for name, value in state.items() if not torch.equal(value, start[name])}


def read(path):
    return torch.load(path, weights_only=True)


def test_frozen_parts_stay_and_the_others_train(tmp_path):
    trained(tmp_path, "decoder", freeze=["visual_encoder"])
    state = read(tmp_path / BEST)["model"]
    names = changed("decoder", state)
    assert {name.split(".")[0] for name in names} == {"text_decoder"}
    assert len(names) == sum(name.startswith("text_decoder") for name in state)
    assert not (tmp_path / adapters.FILE).exists()


@pytest.mark.parametrize("kind", LOSSES)
def test_only_adapters_train_and_the_plain_checkpoint_equals_the_adapted_model(kind, tmp_path):
    model = trained(tmp_path, kind, **ADAPTED)
    content = read(tmp_path / BEST)
    names = changed(kind, content["model"])
    heads = {name for name in content["model"] if "cls_head" in name or "merge_layer" in name}
    maps = {name for name in names if name.rsplit(".", 2)[-2] in ("qkv", "proj", "query", "key", "value")}
    assert names == maps | heads and len(maps) > 10 and all(name.endswith(".weight") for name in maps)
    plain = build(kind)
    plain.load_state_dict(content["model"])
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[kind](plain), LOSSES[kind](model), atol=1e-5, rtol=1e-5)
        assert abs(LOSSES[kind](plain) - LOSSES[kind](build(kind))) > 1e-3
    assert read(tmp_path / BEST)["model"].keys() == content["model"].keys()
    if kind != "nlvr":
        embeddings, text = model.text_decoder.bert.embeddings.word_embeddings, model.text_decoder.cls["predictions"]
        assert text.decoder.weight is embeddings.weight


def test_adapters_alone_are_small_and_give_the_model_again(tmp_path):
    trained(tmp_path, "nlvr", **ADAPTED)
    path, merged = tmp_path / adapters.FILE, read(tmp_path / BEST)["model"]
    assert path.stat().st_size < (tmp_path / BEST).stat().st_size / 5
    assert {name for name in read(path)["adapters"] if ".lora_" not in name} == {
        name for name in merged if "cls_head" in name or "merge_layer" in name
    }
    found = {}
    config = NLVRConfig(adapter_weights=str(path), pretrained="weights")
    evaluate_only(Run(tmp_path, CPU), config, build("nlvr"), lambda model: found.update(model.state_dict()) or {})
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, msg=name)
    again = build("nlvr")
    config = adapters.freeze_and_adapt(again, NLVRConfig(adapter_weights=str(path)), Run(tmp_path, CPU))
    assert (config.adapter_rank, config.adapter_alpha) == (2, 4.0)
    for name, value in adapters.merged_state(again, config).items():
        torch.testing.assert_close(value, merged[name], msg=name)


def test_frozen_parts_get_no_adapters_and_their_recomputing_does_no_harm(tmp_path):
    model = build("vqa", vit_grad_ckpt=True, vit_ckpt_layer=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad")
        trained(tmp_path, "vqa", model=model, freeze=["visual_encoder"], **ADAPTED)
    tensors = read(tmp_path / adapters.FILE)["adapters"]
    assert {name.split(".")[0] for name in tensors} == {"text_encoder", "text_decoder"}
    recomputed = build("vqa", vit_grad_ckpt=True, vit_ckpt_layer=2)
    trained(tmp_path / "a", "vqa", model=recomputed, **ADAPTED)
    trained(tmp_path / "b", "vqa", **ADAPTED)
    whole, again = (read(tmp_path / name / BEST)["model"] for name in "ba")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_resuming_equals_the_run_never_stopped(tmp_path):
    whole = trained(tmp_path / "whole", "nlvr", epochs=2, **ADAPTED)
    trained(tmp_path / "parts", "nlvr", epochs=1, **ADAPTED)
    resumed = trained(tmp_path / "parts", "nlvr", epochs=2, resume=True, **ADAPTED)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(UserError, match="holds another model"):
        trained(tmp_path / "parts", "nlvr", epochs=3, resume=True)


def rank_trained(rank, world_size, folder):
    model = trained(folder / f"rank{rank}", "decoder", steps=1, freeze=["visual_encoder"], **ADAPTED)
    return adapters.adapted_states(model)[1]


def test_two_processes_train_the_same_adapters(tmp_path):
    first, second = run_in_processes(rank_trained, 2, tmp_path)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_predictions_of_the_plain_checkpoint_are_those_of_the_run(tmp_path):
    """By the command lines: predict.py says of the test images what the run's own evaluation said."""
    world, out = write_miniature(tmp_path / "world", 1, num_train=8, num_val=2, num_test=4, num_web=0), tmp_path / "out"
    roots = {"image_root": world, "ann_root": world / "annotations", "coco_gt_root": world / "annotations"}
    run = {"max_epoch": 1, "batch_size": 8, "init_lr": 0.02, "warmup": 0, "adapter_rank": 4, "java": "false"}
    words = ["--config", "configs/miniature/caption_finetune.yaml", "--output_dir", out, *settings(**roots, **run)]
    assert run_here("train_caption.py", *words)[0] == 0
    said = [row["caption"] for row in json.loads((out / "result" / "test_epoch0.json").read_text())]
    names = [row["image"] for row in json.loads((world / "annotations" / "coco_karpathy_test.json").read_text())]

    def predicted(checkpoint):
        rows = tmp_path / f"{checkpoint.parent.name}.jsonl"
        images = [world / name for name in dict.fromkeys(names)]
        assert run_here("predict.py", "caption", *images, "--checkpoint", checkpoint, "--output", rows)[0] == 0
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        return [row["captions"][0]["caption"] for row in found if "captions" in row]

    assert predicted(out / "checkpoint_best.pth") == said
    assert predicted(ROOT / "configs" / "miniature" / "model.safetensors") != said


def test_a_note_tells_how_much_is_trained(tmp_path):
    run, model = Run(tmp_path, CPU), build("decoder")
    adapters.freeze_and_adapt(model, TrainConfig(**ADAPTED), run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (note,) = run.notes
    assert note.startswith(f"{trained / 1e6:.3g} of ") and note.endswith(" million parameters are trained")
    assert trained == sum(value.numel() for value in adapters.adapted_states(model)[1].values())


MISTAKES = [
    ("decoder", {"freeze": ["vision"]}, "no part 'vision'; it has visual_encoder, text_decoder"),
    ("decoder", {"freeze": ["visual_encoder", "text_decoder"]}, "freeze leaves nothing to train"),
    ("decoder", {**ADAPTED, "freeze": ["visual_encoder", "text_decoder"]}, "are in parts that freeze names"),
    ("decoder", {**ADAPTED, "adapter_targets": ["dense9"]}, "no linear layer is called 'dense9'; there are attn.qkv"),
    ("decoder", {**ADAPTED, "adapter_targets": ["predictions.decoder"]}, "shares its weights with another part"),
    ("decoder", {**ADAPTED, "adapter_also": ["cls_head"]}, "nothing to train is called 'cls_head'"),
    ("decoder", {"adapter_weights": "nowhere.pth"}, "nowhere.pth does not exist"),
    ("retrieval", ADAPTED, "do not go with retrieval and pretraining"),
    ("pretrain", {"freeze": ["visual_encoder_m"]}, "no part 'visual_encoder_m'; it has visual_encoder, text_encoder"),
]


@pytest.mark.parametrize(("kind", "values", "told"), MISTAKES)
def test_mistakes(kind, values, told, tmp_path):
    with pytest.raises(UserError, match=told):
        adapters.freeze_and_adapt(build(kind), TrainConfig(**values), Run(tmp_path, CPU))


def test_without_peft_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        adapters.freeze_and_adapt(build("decoder"), TrainConfig(**ADAPTED), Run(tmp_path, CPU))


def test_adapters_of_other_weights_are_refused(tmp_path):
    trained(tmp_path, "decoder", **ADAPTED)
    path, run = str(tmp_path / adapters.FILE), Run(tmp_path, CPU)
    other = build("decoder")
    with torch.no_grad():
        other.visual_encoder.blocks[0].attn.qkv.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match="trained beside other weights than these; they were pretrained=''"):
        adapters.apply_adapters(other, path)
    with pytest.raises(UserError, match="is of another architecture"):
        adapters.apply_adapters(build("vqa"), path)
    with pytest.raises(UserError, match="adapter_rank is 3 and .* has rank 2"):
        adapters.freeze_and_adapt(build("decoder"), TrainConfig(adapter_weights=path, adapter_rank=3), run)
    with pytest.raises(UserError, match="holds no adapters; give the adapters.pth of a run"):
        adapters.freeze_and_adapt(build("decoder"), TrainConfig(adapter_weights=str(tmp_path / BEST)), run)
    content = read(path)
    torch.save(content | {"config": content["config"] | {"adapter_rank": 3}}, path)
    with pytest.raises(UserError, match="holds no adapters"):  # its own tensors say otherwise
        adapters.apply_adapters(build("decoder"), path)
