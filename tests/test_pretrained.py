"""Loading weights: what fits, what is told, what is refused."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models.pretrained
from formula import MED_CONFIG, build, golden
from models.blip import blip_decoder, blip_feature_extractor, load_checkpoint
from models.blip_nlvr import blip_nlvr
from models.blip_pretrain import blip_pretrain
from models.blip_retrieval import blip_retrieval
from models.blip_vqa import blip_vqa
from models.huggingface import to_huggingface
from models.pretrained import checkpoint_kind, load_bert, load_vit, refuse_fresh_parts
from models.weights import read_file
from processes import run_in_processes
from utils import UserError

SIZES = dict(med_config=json.loads(MED_CONFIG.read_text()), image_size=48, vit=golden()["spec"]["vit"])
CONTRAST = dict(embed_dim=32, queue_size=8)


def save(model, path, **entries):
    torch.save({"model": model.state_dict(), **entries}, path)
    return str(path)


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    return save(build("pretrain"), tmp_path_factory.mktemp("weights") / "pretrain.pth", epoch=3)


def same(model, other, prefix=""):
    mine, theirs = model.state_dict(), other.state_dict()
    keys = [key for key in mine if key.startswith(prefix) and key in theirs]
    assert keys
    return all(torch.equal(mine[key], theirs[key]) for key in keys)


def peak():
    """The most memory that this process has had, in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measured_sum(rank, world_size, path):
    """The sum of all entries of a file, and the memory that it took, in MiB."""
    before = peak()
    return sum(float(value.sum()) for value in read_file(path)[0].values()), peak() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_an_optimizer_in_the_file_takes_no_memory(tmp_path):
    moments = {i: torch.zeros(2**24) for i in range(3)}  # 192 MiB
    torch.save({"model": {"a": torch.ones(2**20)}, "optimizer": {"state": moments}}, tmp_path / "a.pth")
    ((total, mebibytes),) = run_in_processes(measured_sum, 1, tmp_path / "a.pth")
    assert total == 2**20 and mebibytes < 64


@pytest.mark.parametrize("position_ids", [False, True])
def test_released_file(tmp_path, capsys, position_ids):
    source = build("decoder")
    state = source.state_dict()
    if position_ids:
        state["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    optimizer = torch.optim.AdamW(source.parameters()).state_dict()
    torch.save({"model": state, "optimizer": optimizer, "config": {"vit": "base"}, "epoch": 4}, tmp_path / "a.pth")
    model = blip_decoder(pretrained=str(tmp_path / "a.pth"), **SIZES)
    assert same(model, source)
    assert capsys.readouterr().out == f"weights from {tmp_path / 'a.pth'}: {len(model.state_dict())} entries loaded\n"


def test_pretraining_starts_every_task(pretraining, capsys):
    source = build("pretrain")
    captioner = blip_decoder(pretrained=pretraining, **SIZES)
    assert same(captioner, source)
    assert "a pretraining checkpoint: a start for fine-tuning" in capsys.readouterr().out
    retrieval = blip_retrieval(pretrained=pretraining, **SIZES, **CONTRAST)
    assert same(retrieval, source)
    assert "fresh: idx_queue, ptr_queue" in capsys.readouterr().out
    vqa = blip_vqa(pretrained=pretraining, **SIZES)
    told = capsys.readouterr().out
    assert "fresh: text_decoder (16)" in told  # keys and values of 8 layers read states of another width
    assert same(vqa, source, "text_encoder") and same(vqa, source, "visual_encoder")
    nlvr = blip_nlvr(pretrained=pretraining, **SIZES)
    state, one = nlvr.state_dict(), source.state_dict()
    for name in ("self.query.weight", "output.dense.bias"):
        original = one[f"text_encoder.encoder.layer.7.crossattention.{name}"]
        for i in (0, 1):
            part = name.replace("self.", f"self{i}.").replace("dense.", f"dense{i}.")
            assert torch.equal(state[f"text_encoder.encoder.layer.7.crossattention.{part}"], original)
    assert "fresh: text_encoder (4), cls_head (4)" in capsys.readouterr().out


def test_momentum_encoders_start_as_copies(tmp_path):
    source = build("pretrain")
    state = {key: value for key, value in source.state_dict().items() if "_m." not in key and "queue" not in key}
    torch.save(state, tmp_path / "a.pth")
    model = blip_pretrain(pretrained=str(tmp_path / "a.pth"), **SIZES, **CONTRAST)
    for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
        assert same(getattr(model, name + "_m"), getattr(source, name)), name


def test_larger_images(pretraining, capsys):
    model = blip_feature_extractor(pretrained=pretraining, **{**SIZES, "image_size": 96})
    assert model.visual_encoder.pos_embed.shape == (1, 37, 48)
    assert "resized: visual_encoder" in capsys.readouterr().out


def test_another_queue(pretraining, capsys):
    model = blip_pretrain(pretrained=pretraining, **SIZES, embed_dim=32, queue_size=10)
    assert model.image_queue.shape == (32, 10)
    assert "image_queue" in capsys.readouterr().out


def test_huggingface_folder(tmp_path):
    source = build("decoder")
    save_file({k: v.clone() for k, v in to_huggingface(source.state_dict()).items()}, tmp_path / "model.safetensors")
    assert same(blip_decoder(pretrained=f"hf:{tmp_path}", **SIZES), source)


def test_load_checkpoint_returns_what_the_released_one_did(pretraining):
    model, message = load_checkpoint(build("decoder"), pretraining)
    assert message.missing_keys == [] and "itm_head.weight" in message.unexpected_keys


def test_vqa_checkpoint_in_a_captioner(tmp_path, capsys):
    source = build("vqa")
    wide = {**SIZES, "vit": {**SIZES["vit"], "embed_dim": 64}}
    vqa = blip_vqa(**wide)
    blip_decoder(pretrained=save(vqa, tmp_path / "vqa.pth"), **wide)
    assert "gibberish until fine-tuned" in capsys.readouterr().out
    assert checkpoint_kind(source.state_dict()) == "VQA"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pretrain", "pretraining"), ("nlvr", "NLVR2"), ("retrieval", "retrieval"), ("decoder", "captioning")],
)
def test_kinds(name, kind):
    assert checkpoint_kind(build(name).state_dict()) == kind


def refused(match, source, factory=blip_decoder, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        factory(pretrained=str(source), **{**SIZES, **kwargs})
    assert "\n" not in str(error.value)


def test_refusals(tmp_path, pretraining):
    refused("nowhere.pth do not exist", tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    refused("damaged or no checkpoint", tmp_path / "text.pth")
    whole = Path(pretraining).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    refused("damaged or no checkpoint", tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("holds no state dict", tmp_path / "list.pth")
    refused("lacks what the task .caption. needs: text_decoder", save(build("retrieval"), tmp_path / "r.pth"))
    refused("another architecture: visual_encoder", pretraining, vit={**SIZES["vit"], "embed_dim": 64})
    refused("has no weights; expected model.safetensors", f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"hello" * 10)
    refused("model.safetensors cannot be read", f"hf:{tmp_path}")


def test_pickle_that_needs_more_is_refused_and_can_be_accepted(tmp_path):
    source = build("decoder")
    path = save(source, tmp_path / "a.pth", config=argparse.Namespace(vit="base"))
    refused("holds argparse.Namespace, not only weights.*allow_pickle=true", path)
    assert same(blip_decoder(pretrained=path, allow_pickle=True, **SIZES), source)


def test_bert_starts_the_decoder_with_its_head(tmp_path, capsys):
    decoder, start = build("decoder").text_decoder, build("decoder").text_decoder
    bert = {k: torch.randn_like(v) for k, v in decoder.state_dict().items() if "crossattention" not in k}
    bias = bert.pop("cls.predictions.decoder.bias")[:30522]
    bert |= {"cls.predictions.bias": bias, "cls.seq_relationship.bias": torch.zeros(2)}
    del bert["cls.predictions.decoder.weight"]  # tied
    torch.save(bert, tmp_path / "bert.bin")
    load_bert(decoder, str(tmp_path / "bert.bin"))
    head = decoder.cls["predictions"]
    assert torch.equal(head.transform["dense"].weight, bert["cls.predictions.transform.dense.weight"])
    assert torch.equal(head.decoder.bias[:30522], bias)
    assert torch.equal(head.decoder.weight, bert["bert.embeddings.word_embeddings.weight"])
    cross = "bert.encoder.layer.0.crossattention.self.query.weight"
    assert torch.equal(decoder.state_dict()[cross], start.state_dict()[cross])
    assert "fresh: bert (80)\n" in capsys.readouterr().out


def test_a_path_of_another_machine_is_got_here_too(tmp_path, monkeypatch):
    (tmp_path / "here").write_text("")
    monkeypatch.setattr(models.weights, "on_main_process", lambda get: tmp_path / "on the main machine")
    assert models.weights._fetch_once_per_machine(lambda: tmp_path / "here") == tmp_path / "here"


def test_starting_weights(tmp_path, capsys):
    model = build("pretrain")
    bert = {f"bert.{k}": torch.randn_like(v) for k, v in model.text_encoder.state_dict().items() if "cross" not in k}
    words = "bert.embeddings.word_embeddings.weight"
    bert[words] = bert[words][:30522]
    bert["bert.embeddings.LayerNorm.gamma"] = bert.pop("bert.embeddings.LayerNorm.weight")
    torch.save(bert, tmp_path / "bert.bin")
    load_bert(model.text_encoder, str(tmp_path / "bert.bin"))
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[:30522], bert[words])
    assert torch.equal(model.text_encoder.embeddings.LayerNorm.weight, bert["bert.embeddings.LayerNorm.gamma"])
    told = capsys.readouterr().out
    assert "resized: embeddings" in told and "fresh: encoder (80)" in told  # 8 layers of cross-attention
    deit = {k: torch.randn_like(v) for k, v in model.visual_encoder.state_dict().items()}
    deit["pos_embed"], deit["head.weight"] = torch.randn(1, 37, 48), torch.randn(10, 48)
    torch.save({"model": deit}, tmp_path / "deit.pth")
    load_vit(model.visual_encoder, str(tmp_path / "deit.pth"))
    assert torch.equal(model.visual_encoder.norm.weight, deit["norm.weight"])
    assert "left over" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["without a head", "another number of classes"])
def test_18_a7_parts_left_fresh_are_refused_in_evaluation(tmp_path, change):
    state = build("nlvr").state_dict()
    if change == "without a head":
        state = {key: value for key, value in state.items() if "cls_head" not in key}
    else:
        width = state["cls_head.2.weight"].shape[1]
        state["cls_head.2.weight"], state["cls_head.2.bias"] = torch.zeros(3, width), torch.zeros(3)
    torch.save({"model": state}, tmp_path / "a.pth")
    model = blip_nlvr(pretrained=str(tmp_path / "a.pth"), **SIZES)  # a start for fine-tuning
    with pytest.raises(UserError, match="a.pth lacks cls_head .*, which would keep random weights"):
        refuse_fresh_parts(model)
    whole = save(build("nlvr"), tmp_path / "whole.pth")
    refuse_fresh_parts(blip_nlvr(pretrained=whole, **SIZES))


def test_18_a7_momentum_encoders_may_be_fresh(pretraining):
    refuse_fresh_parts(blip_retrieval(pretrained=pretraining, **SIZES, **CONTRAST))


def test_18_a7_a_classification_checkpoint_is_not_nlvr2():
    state = dict.fromkeys(["text_encoder.encoder.layer.0.crossattention.self.key.weight", "cls_head.0.weight"])
    assert checkpoint_kind(state) == "classification"
    assert checkpoint_kind(build("nlvr").state_dict()) == "NLVR2"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["decoder", "nlvr"])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, value):
    model = build(kind)
    name, weight = list(model.named_parameters())[-1]
    weight.data.view(-1)[-1] = value
    create = {"decoder": blip_decoder, "nlvr": blip_nlvr}[kind]
    with pytest.raises(UserError, match=f"values in {name} that are not finite"):
        create(save(model, tmp_path / "diverged.pth"), **SIZES)


def test_finite_weights_whose_sum_is_not_are_loaded(tmp_path):
    model = build("decoder")
    model.visual_encoder.pos_embed.data.fill_(1e38)
    loaded = blip_decoder(save(model, tmp_path / "large.pth"), **SIZES)
    assert same(loaded, model)
