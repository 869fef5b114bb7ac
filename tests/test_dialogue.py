"""Visual dialogue: VisDial's format, what is refused of it, the scores, the model, and the script."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT, TINY, run, run_here, settings

from data import build_datasets
from data.dialogue import Dialogues, DialogueTrain
from formula import MED_CONFIG, build, golden
from metrics.dialogue import dialogue_scores, ndcg, option_ranks
from miniature.text import ANSWERS, GROUPS
from miniature.writing import write_miniature
from models.blip_dialogue import BLIP_Dialogue, blip_dialogue
from models.pretrained import refuse_fresh_parts
from utils import UserError

SIZES = [part for value in TINY for part in ("--set", value)]
SIZE = dict(med_config=MED_CONFIG, image_size=48, vit=dict(embed_dim=48, depth=1, num_heads=4, patch_size=16))
FILE = {
    "version": "1.0",
    "split": "val",
    "data": {
        "questions": ["Is it a dog?", "what color"],
        "answers": ["yes", "no", "brown.", "a cat"],
        "dialogs": [
            {
                "image_id": 185565,
                "caption": "An animal.",
                "dialog": [
                    {"question": 0, "answer": 1, "answer_options": [0, 1, 3], "gt_index": 1},
                    {"question": 1, "answer": 2, "answer_options": [2, 0, 1], "gt_index": 0},
                ],
            },
            {"image_id": 7, "caption": "b", "dialog": [{"question": 1, "answer_options": [3, 2, 1]}]},
        ],
    },
}
DENSE = [{"image_id": 185565, "round_id": 2, "gt_relevance": [1.0, 0.0, 0.4]}]
PUBLISHED = ["VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg", "VisualDialog_val2018_000000000007.jpg"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("world"), 4, num_train=12, num_val=4, num_test=7, num_web=0)


def put(folder, content=FILE, dense=None, names=PUBLISHED):
    """Write a file of dialogues, images and dense annotations; return what a dataset is built from."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(folder / name)
    (folder / "dialogues.json").write_text(json.dumps(content))
    (folder / "dense.json").write_text(json.dumps(dense))
    return str(folder / "dialogues.json"), str(folder), None


def changed(change):
    """The file after a change of its "data"."""
    content = copy.deepcopy(FILE)
    change(content["data"])
    return content


def test_a_file_as_published(tmp_path):
    found = Dialogues(*put(tmp_path, dense=DENSE), str(tmp_path / "dense.json"))
    assert [found.path(i) for i in range(2)] == [tmp_path / name for name in PUBLISHED]
    assert found.right == {("185565", 1): 1, ("185565", 2): 0}
    assert found.relevance == {("185565", 2): [1.0, 0.0, 0.4]}
    assert found.texts(0, 0, [3]) == ["is it a dog? [SEP] a cat"]
    assert found.texts(0, 1, [2, 0]) == [f"is it a dog? [SEP] no [SEP] what color [SEP] {x}" for x in ("brown.", "yes")]


def test_images_of_training_are_in_either_folder_of_coco(tmp_path):
    names = ["train2014/COCO_train2014_000000185565.jpg", "val2014/COCO_val2014_000000000007.jpg"]
    found = Dialogues(*put(tmp_path, FILE | {"split": "train"}, names=names))
    assert [found.path(i) for i in range(2)] == [tmp_path / name for name in names]
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=r"1 of 2 files do not exist: \S*train2014/"):
        Dialogues(*put(tmp_path, FILE | {"split": "train"}, names=names[:1]))


def test_own_images_have_a_path(tmp_path):
    own = changed(lambda data: [row.update(image="a.png", image_id="a") for row in data["dialogs"][:1]])
    del own["split"], own["data"]["dialogs"][1]
    assert Dialogues(*put(tmp_path, own, names=["a.png"])).path(0) == tmp_path / "a.png"
    del own["data"]["dialogs"][0]["image"]
    with pytest.raises(UserError, match=r"entry 0 .*has no 'image'; expected its path, or a number and a 'split'"):
        Dialogues(*put(tmp_path, own))


def first(**values):
    """A change of the first round of all."""
    return lambda data: data["dialogs"][0]["dialog"][0].update(values)


REFUSED = {
    "two dialogues of an image": (
        lambda data: data["dialogs"][1].update(image_id="185565"),
        "entries 0 and 1 .*the id 185565 belongs to two dialogues; take one out",
    ),
    "an id that is none": (lambda data: data["dialogs"][1].update(image_id=1.5), "entry 1 .*'image_id' is 1.5"),
    "a right option that is none": (first(gt_index=3), "entry 0 .*round 1: 'gt_index' is 3; expected 0 to 2"),
    "a right option as a text": (first(gt_index="1"), "'gt_index' is '1'; expected 0 to 2"),
    "another right option than the answer": (first(gt_index=0), "'answer' is 'no', and the option 'gt_index' 'yes'"),
    "an option without text": (first(answer_options=[0, 1, 4]), r"'answer_options' is \[0, 1, 4\]; expected numbers"),
    "options as texts": (first(answer_options=["yes", "no", "a"]), "expected numbers of answers"),
    "fewer options": (
        lambda data: data["dialogs"][0]["dialog"][1].update(answer_options=[2, 0]),
        "round 2: 2 answer_options; expected two or more, and as many in every round",
    ),
    "one option": (first(answer_options=[1], gt_index=0), "1 answer_options; expected two or more"),
    "a right option without options": (
        lambda data: data["dialogs"][0]["dialog"][0].pop("answer_options"), "0 answer_options; expected two or more"
    ),
    "a question without text": (first(question=2), "'question' is 2; expected 0 to 1"),
    "an answer without text": (first(answer=-1), "'answer' is -1; expected 0 to 3"),
    "an early round without answer": (
        lambda data: data["dialogs"][0]["dialog"][0].pop("answer"), "expected an object with question and answer"
    ),
    "no round": (lambda data: data["dialogs"][1].update(dialog=[]), "entry 1 .*no rounds as 'dialog'"),
    "a caption that is no text": (lambda data: data["dialogs"][1].update(caption=["a"]), "no text as 'caption'"),
    "an answer that is no text": (lambda data: data["answers"].append(5), "answer is 5; expected a text"),
    "no dialogues": (lambda data: data.pop("dialogs"), "lacks 'data' with the lists questions, answers and dialogs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    change, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        Dialogues(*put(tmp_path, changed(change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt_relevance": [1.0, 0.0]}, "expected 3 numbers from 0, not all 0"),
        ({"gt_relevance": [0, 0, 0]}, "expected 3 numbers from 0, not all 0"),
        ({"gt_relevance": [1, -1, 0]}, "expected 3 numbers from 0, not all 0"),
        ({"gt_relevance": [1, math.inf, 0]}, "expected 3 numbers from 0, not all 0"),
        ({"round_id": 3}, "round 3 of image '185565' has no options, or comes twice"),
        ({"round_id": [1]}, "has no options, or comes twice"),
        ({"image_id": 8}, "round 2 of image '8' has no options"),
    ],
)
def test_dense_annotations_that_are_refused(tmp_path, change, message):
    args = put(tmp_path, dense=[DENSE[0] | change])
    with pytest.raises(UserError, match=message):
        Dialogues(*args, str(tmp_path / "dense.json"))
    (tmp_path / "dense.json").write_text(json.dumps(DENSE * 2))
    with pytest.raises(UserError, match="entry 1 .*comes twice"):
        Dialogues(*args, str(tmp_path / "dense.json"))


def test_training_draws_rounds_and_wrong_options(world):
    config = dict(ann_root=str(world / "annotations"), image_root=str(world), image_size=32, num_rounds=8)
    config |= dict(train_file="", val_file="", test_file="", val_dense="", test_dense="", num_negatives=4)
    found = build_datasets("dialogue", config)["train"]
    assert isinstance(found, DialogueTrain)
    random.seed(0)
    for index, row in enumerate(found.annotation):
        item = found[index]
        groups = [item["dialogue"][i : i + 5] for i in range(0, 40, 5)]
        right = {found.texts(index, i, [one["answer"]])[0] for i, one in enumerate(row["dialog"])}
        assert {texts[0] for texts in groups} <= right and len({texts[0] for texts in groups}) >= 4
        for texts in groups:
            assert len(set(texts)) == 5 and len({text.rpartition(" [SEP] ")[0] for text in texts}) == 1
        assert item["targets"].tolist() == [1, 0, 0, 0, 0] * 8
    found.num_rounds, turns = 4, []
    for _ in range(300):  # each round as often as the others, none twice, in their order
        own = [text.count(" [SEP] ") // 2 for text in found[0]["dialogue"][::5]]
        assert len(set(own)) == 4 and own == sorted(own)
        turns += own
    assert sorted(set(turns)) == list(range(6)) and all(150 < turns.count(turn) < 250 for turn in range(6))
    with pytest.raises(UserError, match="expected 'gt_index' in a round, and more options than num_negatives, 10"):
        build_datasets("dialogue", config | {"num_negatives": 10})


def test_training_needs_right_options(tmp_path):
    with pytest.raises(UserError, match="entry 1 .*does not suffice for training; expected 'gt_index' in a round"):
        DialogueTrain(*put(tmp_path), 1, 1)


# Scores.


def test_ranks():
    assert option_ranks([0.1, 0.9, 0.5]).tolist() == [3, 1, 2]
    assert option_ranks([0.5, 0.5, 0.9]).tolist() == [3, 2, 1]
    with pytest.raises(UserError, match="not numbers"):
        option_ranks([0.1, math.nan])


def test_gain_by_hand():
    """Two options are relevant, so the first two count: 0.5 and 0 of at best 1 and 0.5."""
    assert ndcg([3, 1, 2, 4], [1.0, 0.5, 0.0, 0.0]) == pytest.approx(0.5 / (1 + 0.5 / math.log2(3)))
    assert ndcg([1, 2, 4, 3], [1.0, 0.5, 0.0, 0.0]) == 1.0
    assert ndcg([2, 1], [1.0, 0.0]) == 0.0


def test_scores_by_hand():
    rows = [{"image_id": i, "round_id": 1, "ranks": ranks} for i, ranks in enumerate(([1, 2], [2, 1], [2, 1]))]
    found = dialogue_scores(rows, {("0", 1): 0, ("1", 1): 0}, {("2", 1): [0.0, 1.0], ("1", 1): [1.0, 0.0]})
    assert found == {"mrr": 75.0, "r1": 50.0, "r5": 100.0, "r10": 100.0, "mean_rank": 1.5, "ndcg": 50.0}
    assert dialogue_scores(rows, {}, {}) == {}
    assert set(dialogue_scores(rows, {("0", 1): 0}, {})) == {"mrr", "r1", "r5", "r10", "mean_rank"}


def test_scores_of_random_ranks_against_plain_loops():
    rng = np.random.default_rng(0)
    ranks = [rng.permutation(100) + 1 for _ in range(60)]
    right = rng.integers(0, 100, 60).tolist()
    relevance = [np.where(rng.random(100) < 0.1, rng.integers(1, 6, 100) / 5, 0.0).tolist() for _ in range(60)]
    rows = [{"image_id": i, "round_id": 10, "ranks": row.tolist()} for i, row in enumerate(ranks)]
    keys = [(str(i), 10) for i in range(60)]
    found = dialogue_scores(rows, dict(zip(keys, right, strict=True)), dict(zip(keys, relevance, strict=True)))
    places = [1 + sum(other < row[option] for other in row) for row, option in zip(ranks, right, strict=True)]
    gains = []
    for row, values in zip(ranks, relevance, strict=True):
        k = sum(value != 0 for value in values)
        gain = sum(value / math.log2(rank + 1) for rank, value in zip(row, values, strict=True) if rank <= k)
        best = sum(value / math.log2(place + 2) for place, value in enumerate(sorted(values, reverse=True)[:k]))
        gains.append(gain / best)
    assert found["mrr"] == pytest.approx(100 * sum(1 / place for place in places) / 60)
    assert found["mean_rank"] == pytest.approx(sum(places) / 60)
    for k in (1, 5, 10):
        assert found[f"r{k}"] == pytest.approx(100 * sum(place <= k for place in places) / 60)
    assert found["ndcg"] == pytest.approx(100 * sum(gains) / 60)


# The model.


def test_each_dialogue_reads_its_own_image_and_caption():
    model = BLIP_Dialogue(**SIZE).eval()
    image, captions = torch.randn(2, 3, 48, 48), ["a dog", "two small cats on a sofa"]
    texts = ["is it red [SEP] yes", "is it red [SEP] no", "how many [SEP] two", "how many [SEP] three dogs"]
    with torch.no_grad():
        logits = model(image, captions, texts, train=False)
        for i, text in enumerate(texts):
            alone = model(image[i // 2][None], [captions[i // 2]], [text], train=False)
            torch.testing.assert_close(logits[i], alone[0], rtol=1e-5, atol=1e-5)
        other = model(image, captions[::-1], texts, train=False)
        assert (logits - other).abs().amax(dim=1).min() > 1e-4
        loss = model(image, captions, texts, torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 0, 1])))


def test_dialogues_that_are_padded_in_groups_keep_their_places(monkeypatch):
    model, image = BLIP_Dialogue(**SIZE).eval(), torch.randn(2, 3, 48, 48)
    texts = [f"{'is it red ' * (n * 7 % 5)}what is {n} [SEP] two" for n in range(18)]
    found = model(image, ["a dog", "a cat"], texts, train=False)
    lengths, judge = [], model.judge
    monkeypatch.setattr(model, "judge", lambda projection, part: lengths.append(len(part)) or judge(projection, part))
    assert torch.equal(found, model(image, ["a dog", "a cat"], texts, train=False)) and lengths == [8, 8, 2]
    monkeypatch.setattr("models.blip_dialogue.GROUP", len(texts))
    torch.testing.assert_close(found, model(image, ["a dog", "a cat"], texts, train=False), rtol=1e-5, atol=1e-5)


def test_a_long_dialogue_loses_its_oldest_words():
    model = BLIP_Dialogue(**SIZE).eval()
    longest = model.text_config.max_position_embeddings
    image, ends = torch.randn(1, 3, 48, 48), ["what [SEP] two", "what [SEP] one"]
    with torch.no_grad():
        many = [" ".join(["red"] * 2 * longest) + f" {end}" for end in ends]
        few = [" ".join(["red"] * longest) + f" {end}" for end in ends]
        found = model(image, ["a"], many, train=False)
        assert torch.equal(found, model(image, ["a"], few, train=False))
        assert not torch.equal(found[0], found[1])


def test_weights_of_pretraining_start_it_and_its_own_evaluate(tmp_path):
    spec = golden()["spec"]
    golden_size = dict(med_config=MED_CONFIG, image_size=spec["image_size"], vit=spec["vit"])
    for kind, fresh in (("pretrain", []), ("vqa", ["itm_head.weight", "itm_head.bias"])):
        path = tmp_path / f"{kind}.pth"
        torch.save({"model": build(kind).state_dict()}, path)
        model = blip_dialogue(str(path), **golden_size)
        assert [key for key in model.load_report.fresh if "caption_proj" not in key] == fresh
    with pytest.raises(UserError, match="would keep random weights"):
        refuse_fresh_parts(model)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    refuse_fresh_parts(blip_dialogue(str(tmp_path / "own.pth"), **golden_size))


# The miniature world and the script.


def test_dialogues_of_the_world_are_true(world):
    scenes = json.loads((world / "scenes.json").read_text())
    for split in ("train", "val", "test"):
        found = json.loads((world / f"annotations/visdial_1.0_{split}.json").read_text())["data"]
        for row in found["dialogs"]:
            items, it = scenes[row["image"]]["items"], None
            for item in items:  # the one that the caption names, by its shape or its colour alone
                if {"shape": item["shape"], "color": item["color"]}.items() & named(row["caption"]).items():
                    it = it or item
            for one in row["dialog"]:
                question, answer = found["questions"][one["question"]], ANSWERS[one["answer"]]
                options = [ANSWERS[i] for i in one["answer_options"]]
                assert options[one["gt_index"]] == answer and len(set(options)) == 10
                if question.startswith("is there"):
                    asked = [item for item in items if f"{item['color']} {item['shape']}?" in question]
                    assert answer == ("yes" if asked else "no")
                    it = asked[0] if asked else it
                    continue
                assert answer == right_answer(question, it, items)
                assert any(set(group) <= set(options) for group in GROUPS if answer in group)


def named(caption):
    words = caption.split()
    return {"color": words[1]} if words[2] == "object" else {"shape": words[1]}


def right_answer(question, it, items):
    third = lambda value, names: names[(value >= 0.4) + (value > 0.6)]  # noqa: E731
    return {
        "how many objects are there?": str(len(items)),
        "what color is it?": it["color"],
        "what shape is it?": it["shape"],
        "is it large or small?": it["size"],
        "is it top, center or bottom?": third(it["y"], ("top", "center", "bottom")),
        "is it left, center or right?": third(it["x"], ("left", "center", "right")),
    }[question]


def words_of(world, out, **more):
    values = dict(image_root=world, ann_root=world / "annotations", pretrained="''", batch_size_train=3, num_rounds=2)
    config = ROOT / "configs/miniature/dialogue.yaml"
    return ["--config", config, "--output_dir", out, *SIZES, *settings(**(values | more))]


def test_the_script_on_one_and_two_processes(world, tmp_path):
    """Ranks of trained weights are the same; rounds without right options are ranked and not scored."""
    run("train_dialogue.py", *words_of(world, tmp_path / "run"), processes=2)
    row = json.loads((tmp_path / "run/log.txt").read_text().splitlines()[-1])
    names = ("mrr", "r1", "r5", "r10", "mean_rank", "ndcg")
    assert {"train_loss_itm", *(f"{split}_{name}" for split in ("val", "test") for name in names)} <= row.keys()
    assert (tmp_path / "run/report.html").exists()
    found, weights = [], tmp_path / "run/checkpoint_best.pth"
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run("train_dialogue.py", *words_of(world, out, pretrained=weights), "--evaluate", processes=processes)
        found.append([(out / name).read_text() for name in ("evaluate.txt", "result/val.json", "result/test.json")])
    assert found[0] == found[1]
    scores, rows = json.loads(found[0][0]), json.loads(found[0][2])
    assert len(rows) == 7 * 6 and all(sorted(row["ranks"]) == list(range(1, 11)) for row in rows)
    data = json.loads((world / "annotations/visdial_1.0_test.json").read_text())["data"]["dialogs"]
    right = {(str(row["image_id"]), n): one["gt_index"] for row in data for n, one in enumerate(row["dialog"], 1)}
    expected = dialogue_scores(rows, right, {})
    assert {name: scores[f"test_{name}"] for name in expected} == pytest.approx(expected)
    content = json.loads((world / "annotations/visdial_1.0_test.json").read_text())
    for row in content["data"]["dialogs"]:
        del row["dialog"][-1]["gt_index"], row["dialog"][-1]["answer"]
        for one in row["dialog"][:-1]:
            del one["gt_index"], one["answer_options"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    more = dict(test_file=tmp_path / "test.json", test_dense="''", splits="[test]", pretrained=weights)
    code, told = run_here("train_dialogue.py", *words_of(world, tmp_path / "server", **more), "--evaluate")
    assert code == 0, told
    assert json.loads((tmp_path / "server/evaluate.txt").read_text()) == {}
    last = [row for row in rows if row["round_id"] == 6]
    assert json.loads((tmp_path / "server/result/test.json").read_text()) == last
