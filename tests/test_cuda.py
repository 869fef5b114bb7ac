"""On a GPU: the models give the results of the CPU, and a training step does not wait. Skipped without a card."""

import copy
import json
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, TINY, command, environment, settings
from test_fake_cuda import PROGRESS, QUESTIONS, STEPS, TEXTS

from formula import build, expected, img, load_trained
from launch.config import TrainConfig
from launch.run import BEST, LAST, Run
from miniature.writing import write_miniature
from models.tokenizer import tokenize
from training.loop import Task, take_step
from training.state import compile_blocks, create_state

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLOAT32, BFLOAT16 = 1e-4, 5e-2  # bounds on losses, as a share


@pytest.fixture(autouse=True)
def without_tf32():
    """Products in full float32, so that the bounds are those of float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def batch_on(name, device):
    torch.manual_seed(0)
    return {
        key: value.to(device) if torch.is_tensor(value := make(CPU)) else value for key, make in STEPS[name][3].items()
    }


def step_losses(name, model, device, amp=None):
    torch.manual_seed(0)
    if hasattr(model, "begin_step"):
        model.begin_step()
    with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
        losses = STEPS[name][2]()(model, batch_on(name, device), PROGRESS)
    sum(losses.values()).backward()
    return torch.stack([loss.detach().float().cpu() for loss in losses.values()])


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_losses_and_gradients_are_the_cpus(name, amp):
    """With two pairs a batch, each negative has one choice, so that nothing is drawn."""
    kind, options, _, _ = STEPS[name]
    model = build(kind, **options)
    other = copy.deepcopy(model).to(CUDA)
    found, right = step_losses(name, other, CUDA, amp), step_losses(name, model, CPU)
    bound = FLOAT32 if amp is None else BFLOAT16
    torch.testing.assert_close(found, right, rtol=bound, atol=bound)
    if amp is None:
        grads = {key: p.grad for key, p in other.named_parameters() if p.grad is not None}
        largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None and p.dim())
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(grads[key].cpu(), parameter.grad, rtol=1e-3, atol=1e-4 * largest, msg=key)


def test_features_matches_and_answers_are_the_cpus():
    features, matcher, answerer = build("feature_extractor"), build("itm"), load_trained(build("vqa"), "vqa")
    answers = tokenize(answerer.tokenizer, ["red", "red and white", "two", "no"], "dec")

    def results(device):
        image = img("cuda").to(device)
        candidates = SimpleNamespace(input_ids=answers.input_ids.to(device), attention_mask=None)
        with torch.no_grad():
            yield from (features.to(device)(image, TEXTS, mode) for mode in ("image", "text", "multimodal"))
            yield from (matcher.to(device)(image, TEXTS, head) for head in ("itm", "itc"))
            yield answerer.to(device)(image, QUESTIONS, candidates, train=False, k_test=4).float()

    for right, found in zip(list(results(CPU)), list(results(CUDA)), strict=True):
        torch.testing.assert_close(found.cpu(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_captions_are_the_cpus(compiled):
    model, images = load_trained(build("decoder"), "decoder"), torch.from_numpy(expected("decoder/generate_images"))
    right = model.generate(images[:4], max_length=16, min_length=5)
    model.to(CUDA)
    if compiled:
        compile_blocks(model)
    assert model.generate(images[:4].to(CUDA), max_length=16, min_length=5) == right


@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_does_not_wait(name, amp, tmp_path):
    kind, options, train_step, _ = STEPS[name]
    config = TrainConfig(num_workers=0, clip_grad=1.0, amp=amp)
    state = create_state(Run(tmp_path, CUDA), config, build(kind, **options).train(), 4)
    state.progress.epoch = 1
    batches, task = [batch_on(name, CUDA)], Task(train_step())
    take_step(state, task, batches)  # the first one allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = take_step(state, task, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) for value in losses.values())


def test_a_compiled_step_has_the_same_losses():
    model = build("decoder")
    right = step_losses("captioning", model.to(CUDA), CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_blocks(model)
        torch.testing.assert_close(step_losses("captioning", model, CUDA), right, rtol=1e-4, atol=1e-4)


def run_two_ranks(folder, world, device, *more, **values):
    """Run two ranks of train_retrieval.py; returns the rows of log.txt."""
    values |= dict(image_root=world, ann_root=world / "annotations", pretrained="''", amp="''")
    values |= dict(batch_size_train=4, queue_size=16, k_test=5, embed_dim=16)
    words = ["--config", "configs/miniature/retrieval.yaml", "--output_dir", folder, "--device", device, *more]
    words += [part for value in TINY for part in ("--set", value)] + settings(**values)
    words = command("train_retrieval.py", *words, processes=2)
    done = subprocess.run(words, cwd=ROOT, env=environment(device == "cpu"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_17_1_two_ranks_over_nccl(parallel, tmp_path):
    """An epoch, evaluation, log, best checkpoint and resume."""
    world = write_miniature(tmp_path / "world", 3, num_train=16, num_val=6, num_test=9, num_web=0, num_videos=0)
    (first,) = run_two_ranks(tmp_path / "run", world, "cuda", parallel=parallel, max_epoch=1)
    assert {"train_loss_itc", "train_loss_itm", "val_r_mean", "test_r_mean"} <= first.keys()
    last, best = (torch.load(tmp_path / "run" / name, weights_only=True) for name in (LAST, BEST))
    assert last["epoch"] == 1 and len(last["rng"]) == 2 and last["model"].keys() == best["model"].keys()
    rows = run_two_ranks(tmp_path / "run", world, "cuda", "--resume", parallel=parallel, max_epoch=2)
    assert rows[0] == first and [row["epoch"] for row in rows] == [0, 1]
