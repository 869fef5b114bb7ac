"""Every model against what the released code computes (tests/golden/README.md)."""

import pytest
import torch

import formula
from formula import arr, assert_close, build, expected, golden, grad_norms, img, load_trained, train
from models import cpu_products
from models.tokenizer import init_tokenizer, tokenize
from models.vit import interpolate_pos_embed

LOOP = pytest.mark.parametrize("loop", ["released", "ours"])  # ours begins each step itself
SMOOTH = pytest.mark.parametrize("smooth_padding", [True, False])


@pytest.fixture(autouse=True, params=["torch", "onednn"])
def products(request, monkeypatch):
    """Run every test with PyTorch's products and with all products by oneDNN, however small."""
    monkeypatch.setattr(cpu_products, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(formula, "products", request.param)


def assert_norms(norms, expected, rtol=2e-4):
    for name, value in expected.items():
        assert norms.get(name, 0.0) == pytest.approx(value, rel=rtol, abs=1e-6), name


def captions(step):
    return [f"{caption} {step}" for caption in golden()["itm/captions"]]


def test_features():
    model, image, caption = build("feature_extractor"), img("base"), golden()["base/caption"]
    assert_close(model(image, "", "image"), expected("base/image"))
    assert_close(model(image[:1], caption, "text"), expected("base/text"))
    assert_close(model(image[:1], caption, "multimodal"), expected("base/multimodal"))


def test_position_embeddings_are_resized():
    encoder = build("feature_extractor").visual_encoder
    assert_close(interpolate_pos_embed(arr("a:pos_embed", (1, 37, 48)), encoder), expected("pos_embed/resized"))


@SMOOTH
def test_captioner_loss(smooth_padding):
    model = build("decoder", smooth_padding=smooth_padding)
    loss = model(img("decoder", 3), golden()["decoder/captions"])
    assert_close(loss, expected("decoder/loss", smooth_padding))
    if smooth_padding:
        loss.backward()
        assert_norms(grad_norms(model), golden()["decoder/grad_norms"])


@SMOOTH
def test_captioner_trajectory(smooth_padding):
    model = build("decoder", smooth_padding=smooth_padding)
    losses = train(model, 5, lambda step: [model(img(f"cap{step}", 3), golden()["decoder/captions"])])
    assert_close(losses[:, 0], expected("decoder/losses", smooth_padding), rtol=1e-3)


@SMOOTH
def test_trained_captioner_loss(smooth_padding):
    model = load_trained(build("decoder", smooth_padding=smooth_padding), "decoder")
    loss = model(arr("a:train", (20, 3, 48, 48)), golden()["decoder/trained_captions"])
    assert_close(loss, expected("decoder/trained_loss", smooth_padding))


@pytest.mark.parametrize("setting", golden()["decoder/generate"])
def test_captions(setting):
    model = load_trained(build("decoder"), "decoder")
    settings = {key: value for key, value in setting.items() if key != "captions"}
    assert model.generate(torch.from_numpy(expected("decoder/generate_images")), **settings) == setting["captions"]


@SMOOTH
def test_vqa_loss(smooth_padding):
    model, given = build("vqa", smooth_padding=smooth_padding), golden()["vqa"]
    weights = torch.tensor(given["weights"])
    loss = model(img("vqa"), given["questions"], given["answers"], given["n"], weights)
    assert_close(loss, expected("vqa/loss", smooth_padding))
    if smooth_padding:
        loss.backward()
        assert_norms(grad_norms(model), golden()["vqa/grad_norms"])


def vqa_candidates(model):
    return tokenize(model.tokenizer, golden()["vqa/candidates"], "dec")


def test_vqa_answers():
    model = load_trained(build("vqa"), "vqa")
    image, questions = torch.from_numpy(expected("vqa/inference_images")), golden()["vqa/inference_questions"]
    assert model(image, questions, train=False, inference="generate") == golden()["vqa/generate"]
    for k_test, answers in golden()["vqa/rank"].items():
        chosen = model(image, questions, vqa_candidates(model), train=False, inference="rank", k_test=int(k_test))
        assert [golden()["vqa/candidates"][i] for i in chosen] == answers, f"k_test {k_test}"


@SMOOTH
def test_vqa_ranking_between_answers(smooth_padding):
    model = load_trained(build("vqa", smooth_padding=smooth_padding), "vqa")
    candidates, questions = golden()["vqa/candidates"], golden()["vqa/inference_questions"]
    images, mixed, asked = arr("a:vqatrain", (34, 3, 48, 48)), [], []
    for u, v in golden()["vqa/rank_mix_pairs"]:
        i, j = candidates.index(u), candidates.index(v)
        mixed += [(1 - a / 10) * images[i] + a / 10 * images[j] for a in range(11)]
        asked += [questions[i % 6]] * 11
    chosen = model(torch.stack(mixed), asked, vqa_candidates(model), train=False, inference="rank", k_test=34)
    right = golden() if smooth_padding else golden()["masked"]
    assert [candidates[i] for i in chosen] == right["vqa/rank_mix"]


def test_itm():
    model = build("itm")
    for head in ("itm", "itc"):
        assert_close(model(img("itm"), golden()["itm/captions"], head), expected(f"itm/{head}"))


def test_nlvr():
    model, targets = build("nlvr"), torch.tensor([1, 0])
    assert_close(model(img("nlvr", 4), golden()["nlvr/sentences"], targets, train=False), expected("nlvr/logits"))
    loss = model(img("nlvr", 4), golden()["nlvr/sentences"], targets)
    assert_close(loss, expected("nlvr/loss"))
    loss.backward()
    assert_norms(grad_norms(model), golden()["nlvr/grad_norms"])


@LOOP
@pytest.mark.parametrize("negative_all_rank", [False, True])
def test_retrieval_trajectory(negative_all_rank, loop):
    model, entry = build("retrieval", negative_all_rank=negative_all_rank), f"retrieval_{negative_all_rank}"

    def losses(step):
        if loop == "ours":
            model.begin_step()
        idx = torch.tensor([0, 1] if step == 3 else [2 * step, 2 * step + 1])
        return model(img(f"ret{step}"), captions(step), alpha=0.4 * min(1, step / 4), idx=idx)

    check_trajectory(model, entry, losses, queue_names=("image_queue", "idx_queue"), pointer=lambda: model.ptr_queue)


@LOOP
@SMOOTH
def test_pretraining_trajectory(smooth_padding, loop):
    model = build("pretrain", smooth_padding=smooth_padding)

    def losses(step):
        if loop == "ours":
            model.begin_step()
        return model(img(f"pre{step}"), captions(step), alpha=0.4 * min(1, step / 4))

    if smooth_padding:
        check_trajectory(model, "pretrain", losses, ("image_queue",), lambda: model.queue_ptr)
    else:
        assert_close(train(model, 5, losses), expected("pretrain/losses", False), rtol=1e-3)


def check_trajectory(model, entry, losses_of_step, queue_names, pointer):
    first_norms = {}

    def losses(step):
        if step == 1:
            first_norms.update(grad_norms(model))  # of step 0: zero_grad comes after the next forward
        return losses_of_step(step)

    rows = train(model, 5, losses)
    assert_close(rows[0], expected(f"{entry}/losses")[0])
    assert_close(rows, expected(f"{entry}/losses"), rtol=1e-3)
    assert_norms(first_norms, golden()[f"{entry}/grad_norms"])
    for name in queue_names:
        assert_close(model.state_dict()[name], expected(f"{entry}/{name}"), rtol=1e-3, atol=1e-3)
    assert pointer().tolist() == expected(f"{entry}/ptr").tolist()
    assert_close(model.temp, expected(f"{entry}/temp"), rtol=1e-3)
    check_param_norms(model, golden()[f"{entry}/param_norms"])


def check_param_norms(model, expected_norms):
    """A key's bias adds the same to all scores of a query, so softmax gives it no gradient but rounding, which
    AdamW scales up to full steps of either sign: such a norm can only be held to what five steps of 1e-3 move."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    for name, value in expected_norms.items():
        noise = 5e-3 * params[name].numel() ** 0.5 if name.endswith(("key.bias", "attn.qkv.bias")) else 1e-6
        assert params[name].double().norm().item() == pytest.approx(value, rel=1e-3, abs=noise), name


def test_tokenizer():
    tokenizer, ids = init_tokenizer(), golden()["special_ids"]
    for text, token_ids in golden()["tokenize"]:
        assert tokenizer(text).input_ids == token_ids
    assert tokenizer.bos_token_id == ids["bos"] and tokenizer.enc_token_id == ids["enc"]
    assert [tokenizer.sep_token_id, tokenizer.pad_token_id] == [ids["sep"], ids["pad"]]
    assert tokenizer.cls_token_id == ids["cls"]
    assert len(tokenizer) == ids["len"]
