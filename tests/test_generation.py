"""Decoding: cache, rows that leave the batch, transfers, log-probabilities, the released defaults."""

import pytest
import torch

from formula import arr, build, expected, golden, load_trained
from models.beams import Beams, Text
from models.generation import GenerationConfig, Stepper, generate
from models.tokenizer import tokenize
from training.state import compile_blocks
from utils import UserError

SETTINGS = {
    "beam search": {},
    "one beam": {"num_beams": 1},
    "sampling": {"sample": True, "num_return": 2},
    "penalty": {"repetition_penalty": 1.4},
    "sampling at a temperature": {"sample": True, "temperature": 0.7, "min_length": 9},
}
EVERY_SETTING = pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)


def captioner():
    return load_trained(build("decoder"), "decoder")


def images(count=6):
    return torch.from_numpy(expected("decoder/generate_images"))[:count]


def settings(values):
    return GenerationConfig(**{"max_length": 16, "min_length": 6, **values})


def uniforms(config, count=6):
    return torch.rand(count * config.num_return, config.max_length, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("setting", golden()["decoder/generate"])
def test_a_static_cache_gives_the_golden_captions(setting):
    model = captioner()
    model.text_decoder.static_cache = True  # as on a GPU
    values = {key: value for key, value in setting.items() if key != "captions"}
    assert model.generate(torch.from_numpy(expected("decoder/generate_images")), **values) == setting["captions"]


def test_one_graph_serves_all_lengths():
    model = captioner()
    captions = model.generate(images(2), max_length=16, min_length=16)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    compile_blocks(model, backend="eager", fullgraph=True)
    assert model.generate(images(2), max_length=16, min_length=16) == captions
    assert counted["unique_graphs"] == 3  # of a ViT block, and of a text layer for the prompt and for every token


@EVERY_SETTING
def test_finished_texts_leave_the_batch_and_change_nothing(values, monkeypatch):
    model, config, rows = captioner(), settings(values), []
    numbers = uniforms(config)
    step = Stepper.logits
    monkeypatch.setattr(Stepper, "logits", lambda self, tokens: rows.append(len(tokens)) or step(self, tokens))
    captions, log_probs = model.caption(images(), config, numbers)
    width = config.num_return if config.sample else config.num_beams
    assert rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < 6 * width, rows
    alone = [
        model.caption(image[None], config, part) for image, part in zip(images(), numbers.chunk(6), strict=True)
    ]
    assert captions == [caption for found, _ in alone for caption in found]
    torch.testing.assert_close(log_probs, torch.cat([found for _, found in alone]), rtol=1e-4, atol=1e-4)


@EVERY_SETTING
def test_a_token_costs_one_transfer(values, monkeypatch):
    model, config, steps, reads = captioner(), settings(values), [], []
    states = model.visual_encoder(images())
    step, to_list = Stepper.logits, torch.Tensor.tolist
    monkeypatch.setattr(Stepper, "logits", lambda self, tokens: steps.append(1) or step(self, tokens))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or to_list(self))
    for name in ("item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"{name} reads a value"))
    prompt = torch.tensor([[30522, 1037, 3861, 1997]] * 6)
    generate(model.text_decoder, model.text_decoder.bert.project(states), prompt, 102, config, uniforms(config))
    assert len(reads) == len(steps) + 1  # the prompts, once


@EVERY_SETTING
def test_d3_log_probability_is_the_models_own(values):
    """Without penalty, minimum length and temperature, whatever found the text."""
    model, config = captioner(), settings(values)
    captions, log_probs = model.caption(images(), config, uniforms(config))
    prompt = tokenize(model.tokenizer, model.prompt, "dec").input_ids[:, :-1]
    states = model.visual_encoder(images())
    projection = model.text_decoder.bert.project(states)
    found = generate(model.text_decoder, projection, prompt.expand(6, -1), 102, config, uniforms(config))
    torch.testing.assert_close(found.log_probs, log_probs)
    owners = [i for i in range(6) for _ in range(config.num_return)]
    for owner, ids, log_prob in zip(owners, found.ids, log_probs.tolist(), strict=True):
        ids = torch.cat((ids, torch.tensor([102] if len(ids) < config.max_length else [], dtype=torch.long)))[None]
        alone = model.text_decoder.bert.project(states[owner : owner + 1])
        logits = model.text_decoder.logits(model.text_decoder.hidden_states(ids[:, :-1], projection=alone))
        each = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[0, prompt.shape[1] - 1 :]
        assert log_prob == pytest.approx(each.sum().item(), abs=1e-3)


def test_d4_sampling_has_the_released_penalty():
    model = captioner()
    numbers = uniforms(settings({}))

    def sampled(**values):
        return model.caption(images(), settings({"sample": True, "min_length": 12, **values}), numbers)[0]

    assert sampled() == sampled(repetition_penalty=1.1) != sampled(repetition_penalty=1.0)
    assert settings({}).penalty == 1.0


@pytest.mark.parametrize("prompt", ["a picture of ", "a picture of", "", "two "])
def test_d2_the_prompt_is_cut_by_its_own_characters(prompt, monkeypatch):
    """As in the released code, whatever follows it: a comma, a piece of a word, an apostrophe."""
    model = build("decoder", prompt=prompt)
    for continuation in (", red", "##s red", "' s red", "red"):
        rows = model.tokenizer.convert_tokens_to_ids([*model.tokenizer.tokenize(prompt), *continuation.split()])
        text = model.tokenizer.decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        monkeypatch.setattr("models.blip.generate", lambda *args, rows=rows: Found([torch.tensor(rows)]))
        assert model.generate(arr("a:cut", (1, 3, 48, 48))) == [text[len(prompt) :]]


@EVERY_SETTING
def test_19_a_prompt_for_each_image_gives_what_it_gives_alone(values):
    model, config = captioner(), settings(values)
    prompts = ["a picture of ", "the red ring and", "", "a picture of ", "two", "the red ring and"]
    numbers = uniforms(config)
    captions, log_probs = model.caption(images(), config, numbers, prompts)
    for i, prompt in enumerate(prompts):
        part = slice(i * config.num_return, (i + 1) * config.num_return)
        alone, expected = model.caption(images()[i : i + 1], config, numbers[part], [prompt])
        assert captions[part] == alone
        torch.testing.assert_close(log_probs[part], expected, rtol=1e-4, atol=1e-4)
    usual = model.caption(images(), config, numbers)[0]
    assert model.caption(images(), config, numbers, [model.prompt] * 6)[0] == usual


def test_19_generate_takes_one_prompt_or_many():
    model = captioner()
    one, two = (model.generate(images(2), prompt=prompt) for prompt in ("the red ring", "two"))
    assert model.generate(images(2), prompt=["the red ring", "two"]) == [one[0], two[1]]


class Found:
    """What `generate` would return."""

    def __init__(self, ids):
        self.ids, self.log_probs = ids, torch.zeros(len(ids))


def test_beams_keep_the_best_and_stop_when_no_running_text_can_win():
    beams = Beams([Text([7, 1]), Text([7, 2], -1e9)], length_penalty=1.0)
    assert beams.advance([[-0.5, 3, -0.5], [-1.0, 9, -1.0], [-2.0, 4, -2.0], [-3.0, 5, -3.0]], 10, 9) == [0, 0]
    assert [text.tokens for text in beams.texts] == [[7, 1, 3], [7, 1, 4]]
    assert beams.finished == [(-0.5, Text([7, 1], -1.0, -1.0))] and not beams.done
    origins = beams.advance([[-3.0, 19, -1.0], [-3.5, 13, -1.5], [-4.0, 2, -3.5], [-5.0, 9, -4.5]], 10, 9)
    assert origins == [1, 0] and beams.done  # the end token among the last candidates does not count
    assert beams.best(2) == [Text([7, 1], -1.0, -1.0), Text([7, 1, 4], -3.0, -3.0)]


@pytest.mark.parametrize("mask_padding", [True, False])
def test_d8_an_answer_does_not_depend_on_the_batch_where_padding_is_masked(mask_padding):
    model = load_trained(build("vqa", mask_padding=mask_padding), "vqa")
    short, long = "is it ?", "how many rings are left of the large green star and above the small red heart ?"
    image = arr("a:padded", (8, 3, 48, 48))

    def states_of(texts):
        text = tokenize(model.tokenizer, texts, "enc")
        return model.question_states(image[: len(texts)], text), text.attention_mask

    alone, _ = states_of([short] * 7)
    together, mask = states_of([short] * 7 + [long])
    torch.testing.assert_close(together[:7, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)
    found, expected_log_probs = model.generate_answers(together, mask)[1][:7], model.generate_answers(alone)[1]
    assert torch.allclose(found, expected_log_probs, rtol=0, atol=5e-5) == mask_padding


@EVERY_SETTING
def test_probabilities_that_are_not_numbers_are_no_caption(values):
    """Token 0 was the best of NaN, so that a model that has diverged wrote the same caption for every image."""
    model = captioner()
    model.visual_encoder.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        model.caption(images(2), settings(values))
