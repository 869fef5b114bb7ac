"""`parallel: fsdp` against `ddp`: all tasks and settings, checkpoints, command line; two processes, started once."""

import json
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from scripts import ROOT, TINY, run_here, settings  # and `processes`, by which "forkserver" has imported all
from torch.distributed.tensor import DTensor

from formula import MODELS, arr, fill
from launch import run
from launch.config import TrainConfig
from launch.run import LAST, Run
from miniature.writing import write_miniature
from models import cpu_products, med
from training import adapters, parallel, state
from training.checkpoint import restore, save
from training.contrast import compute_candidates
from training.loop import Task, take_step
from training.optimizer import set_lr
from utils import UserError

CPU = torch.device("cpu")
STEPS, PAIRS, LR = 2, 3, 1e-3
MED = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=0, max_position_embeddings=64,
           hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,  # the processes draw each their own
           vocab_file=str(ROOT / "configs/miniature/vocab.txt"))  # fmt: skip
VIT = dict(embed_dim=32, depth=2, num_heads=2, patch_size=16)
OWN = {
    "vqa": {"drop_path_rate": 0.0},
    "nlvr": {"drop_path_rate": 0.0},
    "retrieval": {"embed_dim": 16, "queue_size": 16, "momentum": 0.5, "negative_all_rank": True},
    "pretrain": {"embed_dim": 16, "queue_size": 16, "momentum": 0.5},
}
ROUNDING = 1e-6  # gradients below this share of the model's largest are left out where AdamW has scaled them
CLIP = 0.5
RECOMPUTED = {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}

# name: kind of model, its options, settings of the training
CASES = {
    "captioning": ("decoder", {}, {}),
    "answering": ("vqa", {}, {}),
    "judging": ("nlvr", {}, {}),
    "retrieval": ("retrieval", {}, {}),
    "pretraining": ("pretrain", {}, {}),
    "recomputed, clipped": ("pretrain", RECOMPUTED, {"text_grad_ckpt": True, "clip_grad": CLIP}),
    "compiled, recomputed": ("decoder", RECOMPUTED, {"compile": True, "text_grad_ckpt": True}),
    "bfloat16": ("pretrain", {}, {"amp": "bf16"}),
    "accumulated": ("retrieval", {}, {"grad_accum": 2}),
    "cached contrast": ("pretrain", {"itc_all_ranks": True}, {"grad_accum": 2}),
    "frozen": ("decoder", RECOMPUTED, {"freeze": ["visual_encoder"]}),
    "groups": ("decoder", {}, {"decay_norms": False, "lr_layer_decay": 0.5, "weight_decay": 1.0}),
    "adapters": ("decoder", {}, {"adapter_rank": 2, "adapter_targets": ["attn.qkv", "query", "value"]}),
}
CONTINUED = ["pretraining", "groups"]
WAYS = [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")]
CAPTIONS = ["a red ring", "two blue stars left of a large green heart", "a small circle", "no objects"]


def small(kind, **options):
    """A model of a kind, as small as the task allows."""
    med_config = {**MED, "num_hidden_layers": 2 if kind == "nlvr" else 1}
    return fill(MODELS[kind](med_config=med_config, image_size=32, vit=VIT, **OWN.get(kind, {}), **options))


def batch_of(number, rank):
    """A rank's own images and texts."""
    image = arr(f"parallel{number}{rank}", (PAIRS, 3, 32, 32))
    first = number + 2 * rank
    captions = [CAPTIONS[(first + i) % len(CAPTIONS)] for i in range(PAIRS)]
    return {"image": image, "caption": captions, "idx": torch.arange(PAIRS) + PAIRS * rank}


def losses_of(kind, model, batch, candidates=None):
    """The named losses of a task."""
    image, texts, more = batch["image"], batch["caption"], {"candidates": candidates}
    found = {
        "decoder": lambda: [model(image, texts)],
        "vqa": lambda: [model(image, texts, ["red", "two", "a ring", "no"], n=[1, 2, 1], weights=torch.ones(4))],
        "nlvr": lambda: [model(torch.cat((image, image.flip(-1))), texts, torch.tensor([0, 1, 0]), train=True)],
        "retrieval": lambda: model(image, texts, 0.4, batch["idx"], **more),
        "pretrain": lambda: model(image, texts, 0.4, **more),
    }[kind]()
    return {f"loss_{number}": value for number, value in enumerate(found)}


# In the processes.


def prepared(case, how, folder, seen):
    """The run, state and task of a case; `seen` takes each batch's losses and each step's gradients."""
    kind, options, values = CASES[case]

    def train_step(model, batch, progress, candidates=None):
        torch.manual_seed(len(seen["losses"]))  # of the negatives
        losses = losses_of(kind, model, batch, candidates)
        seen["losses"].append([value.item() for value in losses.values()])
        return losses

    def keep_gradients(*_):
        grads = {p: parallel._whole(p.grad, None).clone() for p in model.parameters() if p.requires_grad}
        named = model.named_parameters(remove_duplicate=False)  # also by the names of parts that share it
        seen["grads"].append({name: grads[p] for name, p in named if p in grads})

    model = small(kind, **options).train()
    config = TrainConfig(init_lr=LR, num_workers=0, parallel=how, **values)
    config.compile &= how == "fsdp"  # whole copies are compiled under test elsewhere, and here they take their time
    task = Task(train_step, candidates=compute_candidates if case == "cached contrast" else None)
    run = Run(folder, CPU)
    made = state.create_state(run, config, model, STEPS * config.grad_accum)
    seen["hook"] = made.optimizer.register_step_pre_hook(keep_gradients)
    return run, made, task


def step_once(made, task, rank):
    accum, number = made.config.grad_accum, made.progress.step
    set_lr(made.optimizer, LR)
    take_step(made, task, [batch_of(number * accum + i, rank) for i in range(accum)])
    made.progress.finish_step()


def state_of(model):
    return {name: value.clone() for name, value in parallel.full_state(model).items()}


def trained(case, how, rank, folder):
    """Two steps, with a checkpoint between them, and an evaluation."""
    seen = {"losses": [], "grads": []}
    folder.mkdir(exist_ok=True)
    run, made, task = prepared(case, how, folder, seen)
    assert parallel.is_sharded(made.model) == (how == "fsdp")
    step_once(made, task, rank)
    if case in CONTINUED:
        save(made, run)
    step_once(made, task, rank)
    files = saved_adapters(made) if made.config.adapter_rank else {}
    seen.pop("hook").remove()
    found = {name: list(values) for name, values in seen.items()}  # before the steps that follow
    found |= {"state": state_of(made.model) | files, **evaluated(case, made)}
    return {**found, "skipped": is_skipped(made, task, rank)}


def is_skipped(made, task, rank):
    """Whether a step after a bad one leaves this rank's parameters as they are, on the device, sharded or not."""
    before = own_parameters(made.model)
    made.check.bad_step.fill_(0.0)
    step_once(made, task, rank)
    made.check.bad_step.fill_(-1.0)
    same = all(map(torch.equal, own_parameters(made.model), before))
    step_once(made, task, rank)
    moved = not all(map(torch.equal, own_parameters(made.model), before))
    return same and moved


def own_parameters(model):
    """Copies of the trained parameters, as far as this rank holds them; without the temperature, which is clamped."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad and p.dim()]
    return [(p.to_local() if isinstance(p, DTensor) else p).clone() for p in trained]


def saved_adapters(made):
    """What a run with adapters leaves: plain weights, and the adapters with what tells their weights."""
    merged, file = adapters.merged_state(made.model, made.config), adapters.adapter_file(made.model, made.config)
    alone = {**file["adapters"], "base": torch.tensor(file["base"])}
    found = {f"merged {name}": value for name, value in merged.items()} | {f"alone {k}": v for k, v in alone.items()}
    return {name: value.clone() for name, value in found.items()}


def evaluated(case, made):
    """Losses of what evaluation gets."""
    whole = parallel.plain(made.model).eval()
    whole.forward_begins_step = False  # the copy of a sharded model has not seen the loop's `begin_step`
    text = getattr(whole, "text_decoder", None)
    words = text and text.bert.embeddings.word_embeddings
    with torch.no_grad():
        torch.manual_seed(0)
        losses = losses_of(CASES[case][0], whole, batch_of(7, 0))
    tied = text is None or text.cls["predictions"].decoder.weight.data_ptr() == words.weight.data_ptr()
    return {"evaluated": [value.item() for value in losses.values()], "tied": tied}


def continued(case, how, rank, folder):
    """The second step of a run whose first one was taken in its own way or the other; `same` as the saved optimizer."""
    seen = {"losses": [None], "grads": []}
    run, made, task = prepared(case, how, folder, seen)
    restore(made, run, folder / LAST)
    kept = parallel.full_optimizer_state(made.model, made.optimizer)["state"]
    saved = torch.load(folder / LAST, weights_only=True)["optimizer"]["state"]
    same = all(torch.equal(kept[i][key], value) for i, row in saved.items() for key, value in row.items())
    step_once(made, task, rank)
    same = same and len(kept) == len(saved) > 10
    return {"losses": seen["losses"][1:], "grads": seen["grads"], "same": same, "state": state_of(made.model)}


def by_command_line(rank, store, arguments):
    """Run train_caption.py as torchrun would, but for the store; the exit code, and what it said on stderr."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    run.join_process_group = lambda *_: join(rank, store)
    return run_here("train_caption.py", *arguments)


def join(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)


def everything(rank, commands, folder):
    """All that the tests below look at, in one start of a process."""
    torch.set_num_threads(1)
    found = {"commands": [by_command_line(rank, folder / f"store{n}", command) for n, command in enumerate(commands)]}
    join(rank, folder / "store")
    med.FIRST_MERGE_LAYER = 1  # of NLVR2's two layers
    cpu_products.MIN_MULTIPLICATIONS = 0  # also products as small as these are those of a model that is not
    state.compile_blocks = partial(state.compile_blocks, backend="aot_eager", fullgraph=True)
    for case in CASES:
        try:
            found[case] = {how: trained(case, how, rank, folder / f"{case}-{how}") for how in ("ddp", "fsdp")}
        except Exception as error:
            raise RuntimeError(f"in {case}") from error
    for case in CONTINUED:
        for first, then in WAYS:
            found[case][f"{first} to {then}"] = continued(case, then, rank, folder / f"{case}-{first}")
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


# Here.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder):
    """What both ranks found."""
    world = write_miniature(folder / "world", 1, num_train=8, num_val=2, num_test=4, num_web=0)
    annotations = world / "annotations"
    values = settings(image_root=world, ann_root=annotations, coco_gt_root=annotations, java="false", max_length=10)
    values += settings(batch_size=2, max_epoch=1, parallel="fsdp", **RECOMPUTED)
    arguments = ["--config", ROOT / "configs/miniature/caption.yaml", *values]
    arguments += [part for value in TINY for part in ("--set", value)]
    train = [*arguments, "--output_dir", folder / "run"]
    weights = settings(pretrained=folder / "run/checkpoint_best.pth")
    evaluate = [*arguments, "--evaluate", *weights, "--output_dir", folder / "evaluated"]
    mp.start_processes(everything, ([train, evaluate], folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def largest(grads):
    """The largest gradient of a model, the temperature's aside, which can be far larger."""
    return max(grad.abs().max().item() for grad in grads.values() if grad.dim())


def assert_near(value, expected, tolerance):
    torch.testing.assert_close(torch.tensor(value), torch.tensor(expected), atol=tolerance, rtol=tolerance)


def assert_same_gradients(grads, expected, tolerance, rounding):
    """Each parameter's to a share of its largest element, but for rounding."""
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        allowed = tolerance * grad.abs().max() + rounding * largest(expected)
        assert (grads[name] - grad).abs().max() <= allowed, name


def clear_of_rounding(name, steps, rounding):
    """Return where some step's gradient is more than rounding; AdamW makes full steps even of rounding."""
    return torch.stack([(grads[name] == 0) | (grads[name].abs() > rounding * largest(grads)) for grads in steps]).all(0)


@pytest.mark.parametrize("case", CASES)
def test_17_16_fused_adamw_skips_a_bad_step_of_shards(found, case):
    assert all(rank[case][how]["skipped"] for rank in found for how in ("ddp", "fsdp"))


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_whole_copies_do(found, case):
    tolerance, rounding = (1e-2, 1e-3) if case == "bfloat16" else (1e-5, ROUNDING)
    for rank in found:
        whole, shards = rank[case]["ddp"], rank[case]["fsdp"]
        assert_near(shards["losses"], whole["losses"], tolerance)
        for step, pair in enumerate(zip(shards["grads"], whole["grads"], strict=True)):
            assert_same_gradients(*pair, tolerance * 10**step, rounding)  # the second sees what the first has left
        assert shards["state"].keys() == whole["state"].keys() and shards["tied"]
        for name, value in whole["state"].items():
            online = name.replace("_m.", ".")  # the parameter that the momentum encoder follows
            trained = online in whole["grads"][0]
            clear = clear_of_rounding(online, whole["grads"], rounding) if trained else ...
            torch.testing.assert_close(shards["state"][name][clear], value[clear], atol=LR / 20, rtol=0, msg=name)
        assert_near(shards["evaluated"], whole["evaluated"], max(tolerance, 1e-4))


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_what_is_left_out_as_rounding_is_the_keys_biases(found, case):
    """Softmax does not see a key's bias, so its true gradient is 0; of all others nearly none is left out."""
    for grads in found[0][case]["ddp"]["grads"]:
        biases = [grad for name, grad in grads.items() if name.endswith("key.bias")]
        biases += [grad.chunk(3)[1] for name, grad in grads.items() if name.endswith("qkv.bias")]  # query, key, value
        assert all(bias.abs().max() < ROUNDING / 10 * largest(grads) for bias in biases)
        assert len(biases) > 1 or case == "adapters"
        seen = torch.cat([clear_of_rounding(name, [grads], ROUNDING).flatten() for name in grads])
        assert seen.float().mean() > 0.99


def test_settings_take_effect(found):
    losses = {case: found[0][case]["fsdp"]["losses"] for case in CASES}
    assert losses["bfloat16"] != losses["pretraining"] and len(losses["accumulated"]) == 2 * STEPS
    assert losses["cached contrast"][0][0] != losses["pretraining"][0][0]
    clipped, free = (found[0][case]["fsdp"]["grads"][0]["temp"] for case in ("recomputed, clipped", "pretraining"))
    assert abs(clipped) < CLIP < abs(free)
    assert found[0]["graphs"] > 3
    start, frozen = small("decoder").state_dict(), found[0]["frozen"]["fsdp"]["state"]
    moved = {name.split(".")[0] for name, value in frozen.items() if not torch.equal(value, start[name])}
    assert moved == {"text_decoder"}
    name, (slow, fast) = "visual_encoder.cls_token", (found[0][c]["fsdp"]["state"] for c in ("groups", "captioning"))
    assert (slow[name] - start[name]).abs().max() < LR / 2 < (fast[name] - start[name]).abs().max()


@pytest.mark.parametrize("case", CONTINUED)
@pytest.mark.parametrize(("first", "then"), WAYS)
def test_each_way_continues_itself_and_the_other(found, case, first, then):
    for rank in found:
        whole, again = rank[case][first], rank[case][f"{first} to {then}"]
        assert again["same"]
        assert_near(again["losses"], whole["losses"][1:], 1e-5)
        assert_same_gradients(again["grads"][0], whole["grads"][1], 1e-4, ROUNDING)
        if first == then:  # bit for bit
            assert all(torch.equal(again["state"][name], value) for name, value in whole["state"].items())


def test_a_run_by_command_line_and_its_evaluation(found, folder):
    for code, told in [command for rank in found for command in rank["commands"]]:
        assert code == 0 and "Warning" not in told and "error" not in told, told
    trained, evaluated = (folder / name / "result" for name in ("run", "evaluated"))
    captions = json.loads((evaluated / "test.json").read_text())
    assert len(captions) == 4 and captions == json.loads((trained / "test_epoch0.json").read_text())


def test_a_torch_without_ignored_parameters_is_refused(monkeypatch):
    def of_torch_2_6(module, *, mesh=None, reshard_after_forward=True):
        raise AssertionError

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", of_torch_2_6)
    with pytest.raises(UserError, match="fsdp needs torch 2.7 or newer, and this is .*; update torch, or set parallel"):
        parallel.shard(small("decoder"), CPU)


def test_processes_that_add_gradients_up_are_refused():
    parallel._check_averaging(lambda module: None)
    with pytest.raises(UserError, match="sums gradients that it should average; update torch, or set parallel"):
        parallel._check_averaging(lambda module: module.weight.register_hook(lambda grad: 2 * grad))
