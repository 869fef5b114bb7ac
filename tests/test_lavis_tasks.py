"""Tasks that LAVIS fine-tunes: classification, knowledge questions, and its optimizer."""

import json

import pytest
import torch
from PIL import Image
from scripts import TINY, run, settings
from torch import nn

from data.classification import class_names, read_folder, read_pairs
from data.convert import write_tables
from data.transforms import test_transform as make_transform
from data.vqa import VQATest, VQATrain, with_answer
from formula import MED_CONFIG, MODELS
from inference.zero_shot import class_features, class_probabilities
from metrics.knowledge import choice_accuracy, direct_accuracy, exact_match
from miniature.writing import write_miniature
from models.blip_classification import BLIP_Classification
from training.optimizer import create_optimizer, set_lr
from utils import UserError

SIZES = [part for value in TINY for part in ("--set", value)]
CLASSES = ["contradiction", "neutral", "entailment"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 2, num_train=12, num_val=4, num_test=6, num_web=4)


def test_direct_answers_need_three_people():
    rows = [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "cat"}, {"question_id": 3, "answer": "x"}]
    people = [["dog"] * 4 + ["cat"] * 6, ["cat"] * 2 + ["dog"] * 8, ["dog"] * 10]
    truth = [{"question_id": i + 1, "answer": answers} for i, answers in enumerate(people)]
    assert direct_accuracy(rows, truth) == {"overall": pytest.approx(100 * (1 + 2 / 3 + 0) / 3)}
    with pytest.raises(UserError, match=r"1 of 4 annotated questions have no answer in the results \(question_id 9\)"):
        direct_accuracy(rows, [*truth, {"question_id": 9, "answer": ["a"]}])


def test_choices_and_exact_matches():
    rows = [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "cat"}]
    choices = {"choices": ["cat", "dog"], "correct_choice_idx": 1}
    assert choice_accuracy(rows, [{"question_id": i, **choices} for i in (1, 2)]) == {"choice": 50.0}
    assert exact_match(rows, [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": ["a cat"]}]) == {
        "overall": 50.0
    }


def test_direct_answers_are_answers():
    assert with_answer({"direct_answers": ["a", "b"]})["answer"] == ["a", "b"]


def test_rows_of_aokvqa_as_published_name_images_of_coco_by_number(tmp_path):
    asked = {"question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What is it?", "rationales": ["It barks."] * 3}
    asked |= {"choices": ["cat", "dog"], "correct_choice_idx": 1, "direct_answers": ["dog"] * 10}
    rows = [asked | {"split": "train", "image_id": 299207}, asked | {"split": "val", "image_id": 5, "question_id": "b"}]
    files = [tmp_path / "train2017/000000299207.jpg", tmp_path / "000000000005.jpg"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(file)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = {"vqa": str(tmp_path), "vg": ""}, make_transform(16)
    for dataset in (VQATest(str(tmp_path / "rows.json"), *args), VQATrain([str(tmp_path / "rows.json")], *args)):
        assert [dataset.path(i) for i in range(2)] == files and dataset[1]["image"].shape == (3, 16, 16)
    files[1].unlink()
    with pytest.raises(UserError, match=r"1 of 2 files do not exist: \S*val2017/"):
        VQATest(str(tmp_path / "rows.json"), *args)
    del rows[0]["split"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"entry 0 .*lacks 'image'; add it"):
        VQATest(str(tmp_path / "rows.json"), *args)


def test_choices_of_the_world(world, tmp_path):
    files = (world / f"annotations/{name}_test.json" for name in ("aokvqa_v1p0", "gqa"))
    direct, exact = (json.loads(file.read_text()) for file in files)
    assert len(direct) == len(exact) > 12
    for row, other in zip(direct, exact, strict=True):
        right = row["choices"][row["correct_choice_idx"]]
        assert len(set(row["choices"])) == 4 and row["direct_answers"].count(right) >= 7 and other["answer"] == right
        assert {key: row[key] for key in ("image", "question", "question_id")}.items() <= other.items()
    paths = [world / f"annotations/okvqa_test_{name}.json" for name in ("questions", "annotations")]
    write_tables(paths, tmp_path, "images/test/{:07d}.jpg")
    answered = json.loads((tmp_path / "okvqa_test_questions.json").read_text())
    for row, other in zip(answered, direct, strict=True):
        assert {key: row[key] for key in ("image", "question")}.items() <= other.items()
        assert row["answer"] == other["direct_answers"] and row["answer_type"] in ("yes/no", "number", "other")


def test_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    (whole,) = create_optimizer(model, 1e-3, 0.1).param_groups
    assert len(whole["params"]) == 4 and whole["weight_decay"] == 0.1
    groups = create_optimizer(model, 1e-3, 0.1, decay_norms=False).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def test_learning_rates_fall_towards_the_first_block():
    vit = dict(embed_dim=16, depth=2, num_heads=2, patch_size=16)
    model = MODELS["feature_extractor"](med_config=MED_CONFIG, image_size=32, vit=vit)
    optimizer = create_optimizer(model, 1e-3, 0.05, lr_layer_decay=0.5)
    set_lr(optimizer, 8e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    encoder = model.visual_encoder
    parts = (encoder.pos_embed, encoder.blocks[0].norm1.bias, encoder.blocks[1].norm1.bias, encoder.norm.bias)
    expected = [1e-3, 2e-3, 4e-3, 8e-3, 8e-3]
    text = model.text_encoder.embeddings.word_embeddings.weight
    assert [rates[id(part)] for part in (*parts, text)] == pytest.approx(expected)


def test_pairs_in_the_format_of_snli_ve(world, tmp_path):
    rows = read_pairs(world / "annotations/ve_dev.json", world, CLASSES)
    assert len(rows) == 12 and {label for _, _, label in rows} == {0, 1, 2} and rows[0][0].is_file()
    (tmp_path / "bad.json").write_text(json.dumps([{"image": "a", "sentence": "b", "label": "maybe"}]))
    with pytest.raises(UserError, match=r"label is 'maybe'; expected one of contradiction, neutral, entailment"):
        read_pairs(tmp_path / "bad.json", world, CLASSES)
    row = json.loads((world / "annotations/ve_dev.json").read_text())[0]
    (tmp_path / "numbers.json").write_text(json.dumps([row | {"label": 1}]))
    assert read_pairs(tmp_path / "numbers.json", world, ["0", "1"])[0][2] == 1


def folders(tmp_path):
    for name, color in (("blue_square", (0, 0, 255)), ("red_square", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), color).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_for_each_class(tmp_path):
    root = folders(tmp_path)
    assert class_names(root) == ["blue_square", "red_square"]
    rows = read_folder(root, class_names(root), "a text")
    assert [(path.parent.name, text, label) for path, text, label in rows][1:3] == [
        ("blue_square", "a text", 0), ("red_square", "a text", 1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="class folder .*green holds no image"):
        read_folder(root, ["green"])


def test_zero_shot_classification():
    model = MODELS["itm"](
        med_config=MED_CONFIG, image_size=48, embed_dim=16, vit=dict(embed_dim=48, depth=1, num_heads=4, patch_size=16)
    ).eval()
    feats = class_features(model, ["red_square", "dog"], ["a photo of a {}", "one {}"])
    single = [class_features(model, ["red_square"], [template])[0] for template in ("a photo of a {}", "one {}")]
    torch.testing.assert_close(feats[0], nn.functional.normalize((single[0] + single[1]) / 2, dim=0))
    image = torch.randn(3, 3, 48, 48)
    cosines = model(image, ["a photo of a dog"], match_head="itc")
    probabilities = class_probabilities(model, image, torch.stack((single[0], -single[0])), 0.5)
    other = model(image, ["a photo of a red square"], match_head="itc")[:, 0]
    torch.testing.assert_close(probabilities[:, 0], torch.sigmoid(other * 2 / 0.5))
    assert cosines.shape == (3, 1)
    with pytest.raises(UserError, match="expected texts with a place {} for the class"):
        class_features(model, ["dog"], ["a photo"])


def test_17_10_classes_are_compared_in_float32_under_autocast():
    model = MODELS["itm"](
        med_config=MED_CONFIG, image_size=48, embed_dim=16, vit=dict(embed_dim=48, depth=1, num_heads=4, patch_size=16)
    ).eval()
    image = torch.randn(3, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        classes = class_features(model, ["red_square", "dog", "cat"], ["a photo of a {}"])
        found = class_probabilities(model, image, classes, 0.01)
        states = model.visual_encoder(image)[:, 0]
    feats = nn.functional.normalize(model.vision_proj(states.float()), dim=-1)
    assert classes.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, (feats @ classes.T / 0.01).softmax(dim=-1))


def test_classifier():
    vit = dict(embed_dim=48, depth=1, num_heads=4, patch_size=16)
    model = BLIP_Classification(MED_CONFIG, 48, vit, num_classes=4).eval()
    args = torch.randn(2, 3, 48, 48), ["a dog", "two small cats"]
    logits = model(*args, train=False)
    targets = torch.tensor([3, 0])
    assert logits.shape == (2, 4) and not torch.equal(logits, model(args[0], ["a dog", "a cat"], train=False))
    torch.testing.assert_close(model(*args, targets), nn.functional.cross_entropy(logits, targets))


def test_classification_script(world, tmp_path):
    out, config = tmp_path / "out", "configs/miniature/classification.yaml"
    roots = settings(image_root=world, ann_root=world / "annotations", pretrained="''", batch_size_train=12)
    run("train_classification.py", "--config", config, "--output_dir", out, *SIZES, *roots, processes=2)
    row = json.loads((out / "log.txt").read_text().splitlines()[-1])
    assert {"train_loss_cls", "val_acc", "test_acc"} <= row.keys()
    results = json.loads((out / "result/test_epoch0.json").read_text())
    assert len(results) == 18 and set(results[0]) == {"text", "label", "prediction", "probability"}
    model = torch.load(out / "checkpoint_best.pth", weights_only=True)["model"]
    assert model["cls_head.2.weight"].shape[0] == 3


def test_choices_by_the_vqa_script(world, tmp_path):
    rows = json.loads((world / "annotations/vqa_test.json").read_text())[:6]
    for row in rows:
        row["direct_answers"] = row.pop("answer")
        row |= {"choices": ["yes", "no", "red", "two"], "correct_choice_idx": 0}
    (tmp_path / "aokvqa.json").write_text(json.dumps(rows))
    roots = dict(vqa_root=world, vg_root=world, ann_root=world / "annotations", pretrained="''", scoring="aokvqa")
    common = ["--config", "configs/miniature/vqa.yaml", *SIZES, "--evaluate"]
    found = {}
    for inference, name in (("choices", "choice"), ("rank", "overall")):
        out = tmp_path / inference
        more = settings(**roots, test_file=tmp_path / "aokvqa.json", inference=inference)
        run("train_vqa.py", *common, "--output_dir", out, *more)
        assert f"test_{name}" in json.loads((out / "evaluate.txt").read_text().splitlines()[-1])
        found[inference] = json.loads((out / "result/aokvqa.json").read_text())
    assert {row["multiple_choice"] for row in found["choices"].values()} <= {"yes", "no", "red", "two"}
    assert set(next(iter(found["rank"].values()))) == {"direct_answer"}
