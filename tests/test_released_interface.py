"""Code written against the released package: its names, items, calls, checkpoints and scripts."""

import inspect
import json
import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from released_style.retrieval import score_matrices, text_states
from scripts import run
from torch.utils.data import DataLoader

import data
import utils
from data import randaugment
from data.coco_karpathy_dataset import coco_karpathy_train
from data.nocaps_dataset import nocaps_eval
from data.transforms import MEAN, STD
from data.transforms import test_transform as make_transform
from data.video_dataset import ImageNorm
from data.vqa_dataset import vqa_collate_fn, vqa_dataset
from formula import MED_CONFIG, MODELS, arrays, manifest
from inference.ranking import two_stage_scores
from miniature.writing import write_miniature
from models.med import BertConfig, BertLMHeadModel
from models.nlvr_encoder import BertModel as TwoImageBertModel
from models.vit import VisionTransformer
from transform import randaugment as released_randaugment
from utils import UserError

BERT = (
    "BertEmbeddings BertSelfAttention BertSelfOutput BertAttention BertIntermediate BertOutput BertLayer BertEncoder "
    "BertPooler BertPredictionHeadTransform BertLMPredictionHead BertOnlyMLMHead BertPreTrainedModel BertModel"
)
OPERATIONS = "autocontrast brightness color contrast cutout equalize identity posterize rotate sharpness solarize"
LEVELS = "cutout enhance none posterize rotate shear solarize translate"
NAMES = {
    "data": "create_dataset create_sampler create_loader",
    "data.coco_karpathy_dataset": "coco_karpathy_train coco_karpathy_caption_eval coco_karpathy_retrieval_eval",
    "data.flickr30k_dataset": "flickr30k_train flickr30k_retrieval_eval",
    "data.nlvr_dataset": "nlvr_dataset",
    "data.nocaps_dataset": "nocaps_eval",
    "data.pretrain_dataset": "pretrain_dataset",
    "data.utils": "pre_caption pre_question save_result coco_caption_eval",
    "data.video_dataset": "ImageNorm load_jsonl VideoDataset",
    "data.vqa_dataset": "vqa_dataset vqa_collate_fn",
    "models.blip": "BLIP_Base BLIP_Decoder blip_decoder blip_feature_extractor init_tokenizer create_vit is_url "
    "load_checkpoint",
    "models.blip_itm": "BLIP_ITM blip_itm",
    "models.blip_nlvr": "BLIP_NLVR blip_nlvr load_checkpoint",
    "models.blip_pretrain": "BLIP_Pretrain blip_pretrain concat_all_gather tie_encoder_decoder_weights",
    "models.blip_retrieval": "BLIP_Retrieval blip_retrieval concat_all_gather GatherLayer all_gather_with_grad",
    "models.blip_vqa": "BLIP_VQA blip_vqa tile",
    "models.med": f"BertConfig BertLMHeadModel {BERT}",
    "models.nlvr_encoder": BERT,
    "models.vit": "Mlp Attention Block VisionTransformer interpolate_pos_embed",
    "transform.randaugment": "RandomAugment "
    + " ".join(f"{name}_func" for name in f"{OPERATIONS} shear_x shear_y translate_x translate_y".split())
    + "".join(f" {name}_level_to_args" for name in LEVELS.split()),
    "utils": "cosine_lr_schedule warmup_lr_schedule step_lr_schedule SmoothedValue MetricLogger AttrDict compute_acc "
    "compute_n_params setup_for_distributed is_dist_avail_and_initialized get_world_size get_rank is_main_process "
    "save_on_master init_distributed_mode",
}


def test_the_119_public_names_exist():
    found = 0
    for module, names in NAMES.items():
        for name in names.split():
            scope = {}
            exec(f"from {module} import {name}", scope)
            assert callable(scope[name]), (module, name)
            found += 1
    assert found == 119


def test_other_names_do_not():
    import utils

    with pytest.raises(AttributeError, match="module 'utils' has no attribute 'cosine'"):
        _ = utils.cosine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 3, num_train=16, num_val=6, num_test=9, num_web=12, num_videos=2)


@pytest.fixture(scope="module")
def config(world):
    roots = dict(image_root=str(world), vqa_root=str(world), vg_root=str(world), ann_root=str(world / "annotations"))
    return roots | dict(image_size=16, augment=False, prompt="a picture of ", train_files=["vqa_train"])


def tiny(name, **settings):
    vit = dict(embed_dim=48, depth=3, num_heads=4, patch_size=16)
    return MODELS[name](med_config=MED_CONFIG, image_size=48, vit=vit, **settings).eval()


# Items, batches and orders.


@pytest.mark.parametrize(
    ("task", "train", "test"),
    [
        ("caption_coco", ["image", "caption", "image_id"], ["image", "image_id"]),
        ("retrieval_flickr", ["image", "caption", "idx"], ["image", "index"]),
        ("nlvr", ["image0", "image1", "sentence", "label"], ["image0", "image1", "sentence", "label"]),
        ("vqa", ["image", "question", "answers", "weights"], ["image", "question", "question_id"]),
    ],
)
def test_items_unpack_as_tuples_and_are_read_by_name(config, task, train, test):
    first, *_, last = data.create_dataset(task, config)
    for dataset, names in ((first, train), (last, test)):
        item = dataset[1]
        assert isinstance(item, tuple) and len(item) == len(names)
        for value, name in zip(item, names, strict=True):
            assert item[name] is value
    batch = next(iter(DataLoader(last, batch_size=2)))
    assert len(batch) == len(test) and torch.is_tensor(batch[0]) and len(batch[1]) == 2


def test_pretraining_pairs(config, world):
    lists = world / "lists"
    lists.mkdir()
    rows = json.loads((world / "annotations/pretrain_human.json").read_text())[:4]
    for row in rows:
        row["image"] = str(world / row["image"])
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        (lists / f"{name}.json").write_text(json.dumps(part))
    dataset = data.create_dataset(
        "pretrain", {**config, "train_file": [str(lists / "a.json")], "laion_path": str(lists)}
    )
    image, caption = dataset[2]
    dataset.reload_laion(1)
    assert image.shape == (3, 16, 16) and caption != dataset[2][1]


def test_questions_are_joined_as_a_tuple(world):
    dataset = vqa_dataset(lambda image: torch.zeros(3, 4, 4), str(world / "annotations"), world, world, ["vqa_train"])
    image, question, answers, weights, n = vqa_collate_fn([tuple(dataset[0]), dataset[1]])
    assert image.shape == (2, 3, 4, 4) and len(question) == 2 and len(answers) == len(weights) == sum(n)


def test_dataset_classes_take_the_released_arguments(world):
    roots = str(world), str(world / "annotations")
    train = coco_karpathy_train(make_transform(16), *roots, max_words=2, prompt="a picture of ")
    image, caption, number = pickle.loads(pickle.dumps(train))[0]
    assert image.shape == (3, 16, 16) and caption.startswith("a picture of ") and len(caption.split()) == 5
    assert str(inspect.signature(nocaps_eval)) == "(transform, image_root, ann_root, split)"
    assert nocaps_eval(make_transform(16), *roots, split="test")[0][0].shape == (3, 16, 16)
    with pytest.raises(TypeError, match="missing a required argument: 'split'"):
        nocaps_eval(make_transform(16), *roots)


def test_frames_are_normalised_in_place():
    frames, unit = torch.full((2, 3, 4, 4), 255.0), torch.ones(2, 3, 4, 4)
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert ImageNorm()(frames) is frames
    for found in (frames, ImageNorm(list(MEAN), list(STD))(unit)):
        torch.testing.assert_close(found[1, :, 2, 3], expected)


def order(loader):
    return [label for _, _, labels in loader for label in labels.tolist()]


def test_a_training_loader_without_a_sampler_shuffles_anew_every_epoch(config):
    train, _, test = data.create_dataset("retrieval_flickr", config)

    def loaders():
        return data.create_loader([train, test], [None, None], [8, 8], [0, 0], [True, False], [None, None])

    first, second = order(loaders()[0]), order(loaders()[0])
    loader, test_loader = loaders()
    assert first == second == order(loader) != order(loader) and sorted(first) != first
    assert [i for _, index in test_loader for i in index.tolist()] == list(range(len(test)))
    loader.sampler.set_epoch(0)
    assert order(loader) == first


def test_samplers_split_the_training_set(config):
    train = data.create_dataset("retrieval_flickr", config)[0]
    parts = [data.create_sampler([train], [True], 2, rank)[0] for rank in range(2)]
    for sampler in parts:
        sampler.set_epoch(3)
    first, second = map(list, parts)
    assert len(first) == len(second) == len(train) // 2 and not set(first) & set(second)
    parts[0].set_epoch(3)
    assert list(parts[0]) == first != list(parts[0])


def test_augmentation_depends_on_epoch_and_index_only(config):
    train = data.create_dataset("retrieval_flickr", {**config, "augment": True})[0]
    (loader,) = data.create_loader([train], [None], [4], [0], [True], [None])
    image = next(iter(loader))[0]
    random.seed(7)
    loader.sampler.set_epoch(0)
    assert torch.equal(next(iter(loader))[0], image)
    assert loader.dataset is train and train.annotation
    assert [key.epoch for key in pickle.loads(pickle.dumps(list(loader.sampler)[:2]))] == [1, 1]


def test_random_augment_takes_arrays_and_images():
    image = arrays()["aug/picture"]
    for name in released_randaugment.func_dict:
        random.seed(1)
        augment = released_randaugment.RandomAugment(1, 5, augs=[name])
        augment.get_random_ops = lambda name=name: [(name, 1.0, 5)]
        assert augment(image).shape == image.shape and augment(image).dtype == np.uint8
    random.seed(0)
    from_array = released_randaugment.RandomAugment(2, 5)(image)
    random.seed(0)
    assert np.array_equal(from_array, released_randaugment.RandomAugment(2, 5, isPIL=True)(Image.fromarray(image)))


def test_augmentations_of_arrays():
    image = arrays()["aug/picture"]
    for name, args in (("shear_x", 0.15), ("translate_y", 5.0), ("rotate", 15.0)):
        ours = np.asarray(getattr(randaugment, name)(Image.fromarray(image), args))
        assert np.array_equal(getattr(released_randaugment, f"{name}_func")(image, args), ours)
    pixel = np.array([[[100, 200, 50]]], np.uint8)
    assert released_randaugment.posterize_func(pixel, 4).tolist() == [[[96, 192, 48]]]
    assert released_randaugment.posterize_func(pixel, 2).tolist() == [[[64, 192, 0]]]  # the two highest bits stay
    assert released_randaugment.solarize_func(pixel, 128).tolist() == [[[100, 55, 50]]]
    assert released_randaugment.brightness_func(pixel, 1.5).tolist() == [[[150, 255, 75]]]
    # brightness 0.114 * 100 + 0.587 * 200 + 0.299 * 50 = 143.75
    assert released_randaugment.contrast_func(pixel, 0.5).tolist() == [[[121, 171, 96]]]
    assert released_randaugment.color_func(pixel, 0.5).tolist() == [[[121, 171, 96]]]


# Calls.


def test_two_stage_retrieval_by_calls_of_the_parts(config):
    test = data.create_dataset("retrieval_flickr", {**config, "image_size": 48})[2]
    (loader,) = data.create_loader([test], [None], [4], [0], [False], [None])
    torch.manual_seed(0)
    model = tiny("retrieval", embed_dim=16, queue_size=8)

    def encode(batch):
        image_embeds = model.visual_encoder(batch["image"])
        return image_embeds, model.image_feat(image_embeds)

    ours = two_stage_scores(model, encode, data.make_loader(test.dataset, 4, False), test.text, 3, 4)
    i2t, t2i = score_matrices(model, loader, 3, "cpu")
    np.testing.assert_allclose(i2t, ours.i2t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(t2i, ours.t2i, rtol=1e-5, atol=1e-5)


def test_an_encoder_from_a_bert_config():
    model, ids = tiny("feature_extractor"), torch.tensor([[101, 2023, 2003, 102]])
    config = BertConfig.from_json_file(MED_CONFIG)
    config.encoder_width = 48
    found = text_states(config, model.text_encoder.state_dict(), ids)
    torch.testing.assert_close(found, model.text_encoder(ids))
    assert torch.equal(model.text_encoder(ids, return_dict=False, mode="text")[0], model.text_encoder(ids))
    with pytest.raises(UserError, match="argument inputs_embeds is not supported"):
        model.text_encoder(ids, inputs_embeds=found)


def test_an_encoder_of_two_images():
    model, ids = tiny("nlvr"), torch.tensor([[101, 2023, 2003, 102]])
    config = BertConfig.from_json_file(MED_CONFIG)
    config.encoder_width = 48
    encoder = TwoImageBertModel(config=config, add_pooling_layer=False).eval()
    encoder.load_state_dict(model.text_encoder.state_dict())
    images = torch.randn(1, 5, 48), torch.randn(1, 5, 48)
    ones = torch.ones(1, 5, dtype=torch.long)
    output = encoder(ids, encoder_hidden_states=list(images), encoder_attention_mask=[ones, ones], return_dict=True)
    expected = model.text_encoder(ids, None, model.text_encoder.project(*images))
    torch.testing.assert_close(output.last_hidden_state, expected)


def test_a_decoder_called_as_released():
    model, image = tiny("decoder"), torch.randn(2, 3, 48, 48)
    config = BertConfig.from_json_file(MED_CONFIG)
    config.encoder_width = 48
    decoder = BertLMHeadModel(config=config).eval()
    decoder.load_state_dict(model.text_decoder.state_dict())
    text = model.tokenizer(["a picture of a dog", "a picture of two"], padding="longest", return_tensors="pt")
    text.input_ids[:, 0] = model.tokenizer.bos_token_id
    labels = text.input_ids.masked_fill(text.input_ids == model.tokenizer.pad_token_id, -100)
    labels[:, : model.prompt_length] = -100
    states = model.visual_encoder(image)
    args = dict(attention_mask=text.attention_mask, encoder_hidden_states=states, labels=labels, return_dict=True)
    output = decoder(text.input_ids, **args)
    assert output.logits.shape == (2, text.input_ids.shape[1], len(model.tokenizer))
    torch.testing.assert_close(output.loss, model(image, ["a picture of a dog", "a picture of two"]))
    assert decoder(text.input_ids, reduction="none", **args).loss.shape == (2,)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_called_as_released(num_beams):
    model, image = tiny("decoder"), torch.randn(2, 3, 48, 48)
    prompt = model.tokenizer([model.prompt] * 2, return_tensors="pt").input_ids[:, :-1]
    prompt[:, 0] = model.tokenizer.bos_token_id
    states = model.visual_encoder(image).repeat_interleave(num_beams, dim=0)
    ids = model.text_decoder.generate(
        input_ids=prompt,
        max_length=9,
        min_length=5,
        num_beams=num_beams,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        repetition_penalty=1.1,
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long),
    )
    found = [model.tokenizer.decode(row, skip_special_tokens=True)[len(model.prompt) :] for row in ids]
    expected = model.generate(image, num_beams=num_beams, max_length=9, min_length=5, repetition_penalty=1.1)
    assert found == expected and ids.shape[0] == 2


def test_vision_transformer_takes_released_arguments():
    encoder = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, use_grad_checkpointing=True, ckpt_layer=1,
        drop_path_rate=0,
    )  # fmt: skip
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 5, 48)
    assert not [name for name, _ in encoder.named_parameters() if name.startswith("head")]


# Checkpoints.


@pytest.mark.parametrize("entry", [entry for entry in manifest() if entry.endswith("_base")])
def test_parameters_stand_in_the_released_order(entry):
    """So that the state of an optimizer, which is saved by number, belongs to the right parameters."""
    released, buffers = manifest()[entry], ("position_ids", "_queue", "_ptr")
    with torch.device("meta"):
        model = MODELS[entry.removesuffix("_base")](image_size=released["image_size"], vit="base")
    names = [key for key in released["keys"] if key not in released["tied"] and not key.endswith(buffers)]
    assert [name for name, _ in model.named_parameters()] == [n for n in names if n != "ptr_queue"]


@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_released_checkpoints_load_strictly(name):
    model, other = (tiny(name, embed_dim=16, queue_size=8) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    state = {**model.state_dict(), "text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    if name == "pretrain":
        state["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    other.load_state_dict(state, strict=True)
    torch.optim.AdamW(other.parameters(), lr=1e-3).load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    pointer = {"pretrain": "queue_ptr", "retrieval": "ptr_queue"}[name]
    state["ptr_queue" if pointer == "queue_ptr" else "queue_ptr"] = state.pop(pointer) + 4
    other.load_state_dict(state, strict=True)
    assert getattr(other, pointer).item() == 4


# Scripts.


def test_a_task_of_slurm_that_sees_one_gpu_uses_it(monkeypatch):
    """LOCAL_RANK counts the node's tasks; released scripts give `args.gpu` to DistributedDataParallel."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr("released.utils.setup_for_distributed", lambda is_main: None)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(name, str(value))
    args = SimpleNamespace(device="cuda", dist_url="env://")
    utils.init_distributed_mode(args)
    assert (args.rank, args.gpu, chosen) == (3, 0, [0])


def test_a_captioning_script_on_one_and_two_processes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without Java
    text = json.loads(MED_CONFIG.read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "med_config.json").write_text(json.dumps(text))
    vit, med_config = dict(embed_dim=32, depth=1, num_heads=2, patch_size=16), str(tmp_path / "med_config.json")
    hyper = dict(batch_size=8, init_lr=1e-3, min_lr=0, weight_decay=0.05, max_epoch=2, pretrained="")
    path = tmp_path / "config.json"
    sizes = dict(vit=vit, med_config=med_config, image_size=32)
    path.write_text(json.dumps({**config, **sizes, **hyper, "coco_gt_root": config["ann_root"]}))
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        done = run(
            "tests/released_style/caption.py", "--config", path, "--output_dir", out, "--device", "cpu",
            processes=processes,
        )  # fmt: skip
        scores = json.loads(re.search(r"scores: (.*)", done.stdout)[1])
        assert scores["loss"] < 10 and "CIDEr" in scores
        assert done.stdout.count("averaged:") == 2  # printed by the main process alone
        rows = json.loads((out / "val.json").read_text())
        assert len({row["image_id"] for row in rows}) == len(rows) == 6
