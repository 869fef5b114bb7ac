"""Every task on device "cuda" without a card: fake tensors have shapes and devices but no values.

A tensor on the wrong device, a shape that depends on values, or a read of a value is an error there, and each is a
fault on a GPU: the first crashes, the others make the host wait. Reads that are allowed are listed by name.
"""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.models import vision_transformer
from torch._subclasses import FakeTensorMode

import eval_vqa_video
import pretrain
import train_caption
import train_classification
import train_dialogue
import train_nlvr
import train_retrieval
import train_vqa
from formula import MED_CONFIG, MODELS, build, golden
from inference import ranking
from inference.zero_shot import class_features, class_probabilities
from models import blip_vqa, med
from models.generation import GenerationConfig, Stepper, read_choices
from models.prefix_tree import PrefixTree
from training.contrast import compute_candidates

CUDA = torch.device("cuda")
AMP = pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
TEXTS = ["a picture of a red ring", "a picture of two stars left of a heart"]
QUESTIONS = ["what is it ?", "how many rings are left of the star ?"]
# Values that the host reads, each once per batch, and never in a training step: labels on the CPU, whose number decides
# a shape; the candidates of VQA, whose prefix trees are made on the host; in decoding, the chosen tokens; in ranking,
# the pairs to match and all scores, each once.
# By name: labelled_positions, select_trees, read_choices, find_candidates, wanted_pairs and fill_matrices.


def all_positions(labels):
    """In place of `labelled_positions`: as if all labels counted."""
    return torch.arange(labels.numel())


def any_trees(model, answer_ids, candidates):
    """In place of `select_trees`: trees of 9 nodes."""
    rows, (k, length) = len(candidates), (candidates.shape[1], answer_ids.shape[1] - 1)
    ids, node = (torch.zeros(rows, *shape, dtype=torch.long, device=CUDA) for shape in ((9,), (k, length)))
    return PrefixTree(ids, ids, torch.ones(rows, 9, 9, dtype=torch.bool, device=CUDA), node)


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """Replace the allowed reads, and timm's drop-path rates, which it reads from a tensor while a model is built."""
    monkeypatch.setattr(med, "labelled_positions", all_positions)
    monkeypatch.setattr(med, "FIRST_MERGE_LAYER", 1)  # of NLVR2's two layers
    monkeypatch.setattr(blip_vqa.BLIP_VQA, "select_trees", any_trees)
    rates = lambda rate, depth: [rate * i / max(depth - 1, 1) for i in range(depth)]  # noqa: E731
    monkeypatch.setattr(vision_transformer, "calculate_drop_path_rates", rates)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.fixture
def fake():
    """Fake tensors, and a "cuda" that need not be there."""
    with FakeTensorMode():
        yield


def model_of(kind, **options):
    """A tiny model of a kind on the fake device."""
    spec = golden()["spec"]
    sizes = {"embed_dim": 32, "queue_size": 16} if kind in ("retrieval", "pretrain") else {}
    med_config = json.loads(MED_CONFIG.read_text()) | {"num_hidden_layers": 2}
    settings = {"med_config": med_config, "image_size": spec["image_size"], "vit": spec["vit"]}
    with CUDA:
        return MODELS[kind](**settings, **sizes, **options)


def tensor(*values):
    """What makes a tensor of values on a device."""
    return lambda device: torch.tensor(values).to(device)


def image(device):
    return torch.randn(2, 3, 48, 48, device=device)


def amp_context(amp):
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast("cuda", dtype, enabled=bool(amp))


PROGRESS = SimpleNamespace(epoch_fraction=0.5)
PAIRS = {"image": image, "caption": lambda _: TEXTS}
# kind of model, its options, train_step, and its batch
STEPS = {
    "captioning": ("decoder", {}, lambda: train_caption.train_step, PAIRS),
    "captioning, labelled only": ("decoder", {"smooth_padding": False}, lambda: train_caption.train_step, PAIRS),
    "recomputed": (
        "decoder", {"vit_grad_ckpt": True, "vit_ckpt_layer": 1}, lambda: train_caption.train_step, PAIRS,
    ),
    "pretraining": ("pretrain", {}, lambda: partial(pretrain.train_step, alpha=0.4), PAIRS),
    "pretraining, labelled only": (
        "pretrain", {"smooth_padding": False}, lambda: partial(pretrain.train_step, alpha=0.4), PAIRS,
    ),
    "retrieval": (
        "retrieval", {}, lambda: partial(train_retrieval.train_step, alpha=0.4), PAIRS | {"idx": tensor(1, 2)},
    ),
    "VQA": (
        "vqa", {}, lambda: train_vqa.train_step,
        {"image": image, "question": lambda _: QUESTIONS, "answer": lambda _: ["red", "two", "a ring"],
         "n": lambda _: [1, 2], "weights": tensor(1.0, 0.5, 0.5)},
    ),
    "classification": (
        "classification", {}, lambda: train_classification.train_step,
        {"image": image, "text": lambda _: TEXTS, "label": tensor(0, 2)},
    ),
    "dialogue": (
        "dialogue", {}, lambda: train_dialogue.train_step,
        PAIRS | {"dialogue": lambda _: [QUESTIONS, TEXTS], "targets": tensor([1, 0], [1, 0])},
    ),
    "NLVR2": (
        "nlvr", {}, lambda: train_nlvr.train_step,
        {"image0": image, "image1": image, "sentence": lambda _: TEXTS, "label": tensor(0, 1)},
    ),
}  # fmt: skip


@AMP
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_reads_no_value(fake, name, amp):
    kind, options, train_step, batch = STEPS[name]
    model = model_of(kind, **options).train()
    if hasattr(model, "begin_step"):
        model.begin_step()
    with amp_context(amp):
        losses = train_step()(model, {key: make(CUDA) for key, make in batch.items()}, PROGRESS)
    assert losses and all(loss.device.type == "cuda" and loss.requires_grad for loss in losses.values())


@AMP
@pytest.mark.parametrize("name", ["pretraining", "retrieval"])
def test_a_step_of_several_batches_contrasted_as_one(fake, name, amp):
    kind, options, train_step, batch = STEPS[name]
    model = model_of(kind, itc_all_ranks=True, **options).train()
    batches = [{key: make(CUDA) for key, make in batch.items()} for _ in range(2)]
    model.begin_step()
    with amp_context(amp):
        for part, candidates in zip(batches, compute_candidates(model, batches), strict=True):
            assert len(train_step()(model, part, PROGRESS, candidates)) > 1


@AMP
def test_features_and_matching(fake, amp):
    features, matcher = model_of("feature_extractor").eval(), model_of("itm").eval()
    with amp_context(amp), torch.no_grad():
        found = [features(image(CUDA), TEXTS, mode) for mode in ("image", "text", "multimodal")]
        found += [matcher(image(CUDA), TEXTS, head) for head in ("itm", "itc")]
    assert all(x.device.type == "cuda" for x in found)


@AMP
@pytest.mark.parametrize("kind", ["decoder", "vqa"])
def test_a_token_of_decoding(fake, kind, amp):
    """All that runs on the device for a token, up to the one transfer."""
    model = model_of(kind).eval()
    config = GenerationConfig(max_length=12, min_length=8, repetition_penalty=1.1)
    with amp_context(amp), torch.no_grad():
        states = model.visual_encoder(image(CUDA)) if kind == "decoder" else torch.randn(2, 7, 64, device=CUDA)
        stepper = Stepper(model.text_decoder, model.text_decoder.bert.project(states), 102, config)
        logits = stepper.logits(torch.full((2, 4), 30522, device=CUDA)).repeat_interleave(3, dim=0)
        stepper.branch(3)
        for tokens in ([[7]] * 6, [[8]] * 6):
            logits = stepper.logits(stepper.send(tokens))
            stepper.reorder([0, 0, 2, 5, 4, 3], 4)
        texts = [SimpleNamespace(tokens=[30522, 5, 6, 7, 8]) for _ in range(6)]
        scores = stepper.constrain(logits.log_softmax(dim=1), texts)
        assert scores.view(2, -1).topk(6).values.device.type == "cuda"
        with pytest.raises(Exception, match="_local_scalar_dense"):
            read_choices(scores.argmax(dim=1), logits)  # the one transfer
        assert stepper.keep([1]) == [3, 4, 5]
        assert stepper.logits(stepper.send([[9]] * 3)).shape == (3, logits.shape[1])


@AMP
def test_answers_are_ranked(fake, amp):
    model = model_of("vqa").eval()
    with amp_context(amp):
        candidates = torch.randint(5, 90, (40, 6), device=CUDA)
        answers = SimpleNamespace(input_ids=candidates, attention_mask=None)
        found = model(image(CUDA), QUESTIONS, answers, train=False, k_test=7)
    assert found.device.type == "cuda" and found.shape == (2,)


@AMP
def test_classes_of_images_without_training(fake, amp):
    model = model_of("itm").eval()
    with amp_context(amp):
        found = class_probabilities(model, image(CUDA), class_features(model, ["dog", "cat"], ["a {}", "one {}"]), 0.01)
    assert found.device.type == "cuda" and found.dtype == torch.float32 and found.shape == (2, 2)


@AMP
def test_questions_about_a_clip_share_its_projection(fake, amp):
    model = model_of("vqa").eval()
    batch = {"index": torch.tensor([0]), "error": [""], "video": torch.stack((image(CUDA),))}  # two frames
    rows = [{"question_id": number, "question": text} for number, text in enumerate(QUESTIONS)]
    dataset = SimpleNamespace(questions=[rows], answer_list=["red", "two"])
    loader, config = SimpleNamespace(dataset=dataset), SimpleNamespace(inference="rank", batch_size=2, k_test=2)
    with amp_context(amp), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_vqa_video, "prefetch", lambda *_: [batch])
        patch.setattr(eval_vqa_video, "track", lambda *_: [])
        chosen = []
        patch.setattr(eval_vqa_video, "choose", lambda _, states, *__: chosen.append(states) or ["red", "two"])
        found = eval_vqa_video.answer(model, loader, config, SimpleNamespace(device=CUDA))
    assert [row.get("answer") for row in found] == [None, "red", "two"] and chosen[0].device.type == "cuda"


@AMP
def test_options_of_a_dialogue_are_judged(fake, amp):
    model = model_of("dialogue").eval()
    with amp_context(amp), torch.no_grad():
        own = model.project(image(CUDA), TEXTS).select(torch.tensor([1], device=CUDA))
        logits = model.judge(own.read_by(2), QUESTIONS)
    assert logits.device.type == "cuda" and logits.shape == (2, 2)


@AMP
@pytest.mark.parametrize("keep_images", ["device", "host"])
def test_both_stages_of_retrieval(fake, amp, keep_images, monkeypatch):
    """The k best are read once for all images (`wanted_pairs`), and the scores once at the end."""
    model, reads = model_of("retrieval").eval(), []
    monkeypatch.setattr(ranking, "wanted_pairs", lambda *_: [[0, 1]] * 4)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: reads.append(1) or self)
    monkeypatch.setattr(ranking, "fill_matrices", lambda pairs, *_: pairs)

    def encode(batch):
        states = model.visual_encoder(batch["image"])
        return states, model.image_feat(states)

    with amp_context(amp):
        pairs = ranking.two_stage_scores(model, encode, [{"image": image(CUDA)}] * 2, TEXTS, 2, 2, keep_images)
    assert [scores.shape for _, _, scores in pairs] == [(2,)] * 4 and len(reads) == 4


def test_what_the_simulation_finds(fake):
    """It refuses mixed devices, reads, and shapes that depend on values; autocast is on as on a card."""
    with amp_context("bf16"):
        assert torch.nn.Linear(3, 3, device=CUDA)(torch.randn(2, 3, device=CUDA)).dtype == torch.bfloat16
    x = torch.randn(3, device=CUDA)
    for wrong in (lambda: x + torch.randn(3), lambda: x[0].item(), lambda: x[x > 0], lambda: bool(x.sum() > 0)):
        with pytest.raises(Exception, match="device|item|data-dependent|_local_scalar_dense|nonzero"):
            wrong()


class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that read a value or whose shape depends on one."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "multinomial", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_17_6_an_eager_step_on_the_cpu_reads_no_value(name, monkeypatch):
    monkeypatch.undo()  # nothing is replaced here
    kind, options, train_step, batch = STEPS[name]
    model = build(kind, num_layers=2, **options).train()
    values = {key: make(torch.device("cpu")) for key, make in batch.items()}
    if hasattr(model, "begin_step"):
        model.begin_step()
    with CountReads() as reads:
        sum(train_step()(model, values, PROGRESS).values()).backward()
    assert reads.found == []
