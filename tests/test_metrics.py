"""Tests of the metrics, against hand-computed values, golden values and the published scorers."""

import contextlib
import hashlib
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import caption as caption_metrics
from metrics.caption import caption_scores, domain_scores, simple_tokenize
from metrics.classification import accuracy, consistency
from metrics.retrieval import itm_eval, retrieval_scores
from metrics.vqa import CONTRACTIONS, answer_accuracy, normalize_answer, vqa_accuracy
from utils import UserError

GOLDEN = Path(__file__).parent / "golden" / "tiny"

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")

REFERENCES = {
    7: ["A red ball lies on the green grass.", "The ball is red; it isn't blue!"],
    "x9": ["Two dogs (both black) run along the beach.", "dogs running near the sea"],
    12: ["A man riding a wave on a surfboard.", "a surfer on a big wave"],
    13: ["A plate of food, with a fork.", "some food on a white plate"],
}
PREDICTIONS = {
    "7": "a red ball on the grass",
    "x9": "two black dogs run near the sea",
    "12": "A man on a big wave.",
    "13": "a cat sleeps",
}


def ground_truth(folder, domains=None):
    """Write the references in the COCO caption format."""
    annotations = [
        {"id": n, "image_id": key, "caption": text}
        for n, (key, texts) in enumerate(REFERENCES.items())
        for text in texts
    ]
    images = [{"id": key} | ({"domain": domains[n]} if domains else {}) for n, key in enumerate(REFERENCES)]
    file = folder / "gt.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def result_rows(predictions=PREDICTIONS):
    """Return rows as a captioning run writes them."""
    return [{"image_id": key, "caption": text} for key, text in predictions.items()]


@pytest.fixture
def no_java(monkeypatch):
    """Hide Java."""
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)


# Captions


@needs_java
def test_caption_scores_equal_pycocoevalcap(tmp_path):
    """The scores are those of pycocoevalcap's classes on tokens of its own tokenizer."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    scores, left_out = caption_scores(result_rows(), ground_truth(tmp_path))
    references = {str(k): [{"caption": c} for c in v] for k, v in REFERENCES.items()}
    gts = PTBTokenizer().tokenize(references)
    res = PTBTokenizer().tokenize({k: [{"caption": v}] for k, v in PREDICTIONS.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        bleu = Bleu(4).compute_score(gts, res)[0]
    expected = {f"Bleu_{n + 1}": value for n, value in enumerate(bleu)}
    for name, metric in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        expected[name] = metric.compute_score(gts, res)[0]
    assert {k: v for k, v in scores.items() if k != "SPICE"} == pytest.approx(expected)
    assert "SPICE" in scores or "SPICE" in left_out


def test_perfect_captions_and_silence(tmp_path, no_java, capfd):
    """A caption equal to a reference has BLEU 1, whatever the case; nothing is printed."""
    rows = result_rows({str(k): v[0].upper() for k, v in REFERENCES.items()})
    scores, left_out = caption_scores(rows, ground_truth(tmp_path))
    assert scores["Bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["ROUGE_L"] == pytest.approx(1.0)
    assert set(scores) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert set(left_out) == {"PTBTokenizer", "METEOR", "SPICE"}
    assert all("Java" in reason for reason in left_out.values())
    assert capfd.readouterr() == ("", "")


def test_duplicate_and_foreign_ids(tmp_path, no_java):
    """The first of several captions of an image counts; ids outside the ground truth do not."""
    truth = ground_truth(tmp_path)
    expected = caption_scores(result_rows(), truth)[0]
    more = [*result_rows(), {"image_id": 7, "caption": "nonsense"}, {"image_id": 99, "caption": "elsewhere"}]
    assert caption_scores(more, truth)[0] == expected
    assert caption_scores(more[::-1], truth)[0] != expected


def test_missing_captions_are_named(tmp_path):
    """Images without a caption are counted and the first are named."""
    with pytest.raises(UserError, match=r"3 of the 4 images.*7, x9, 13"):
        caption_scores([{"image_id": 12, "caption": "a wave"}], ground_truth(tmp_path))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"annotations": [{"caption": "a"}]}', "{", '{"annotations": []}']
)
def test_wrong_ground_truth(tmp_path, text):
    """A file of another format is refused in one line."""
    file = tmp_path / "gt.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        caption_scores(result_rows(), file)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="absent"):
        caption_scores(result_rows(), tmp_path / "absent.json")


def test_failing_metric_loses_no_other(tmp_path, no_java, monkeypatch):
    """The failure of one metric becomes a reason."""

    def broken(scorer, references, predictions):
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr("pycocoevalcap.cider.cider.Cider.compute_score", broken)
    scores, left_out = caption_scores(result_rows(), ground_truth(tmp_path))
    assert {"Bleu_4", "ROUGE_L"} <= scores.keys() and "CIDEr" not in scores
    assert left_out["CIDEr"] == "failed: RuntimeError: out of order"


ODD = PREDICTIONS | {"7": "", "x9": " . ", "13": "A DISH, \u00c9CLAIR IN IT \ud800 ||| b\ntwo\u2028three"}


@needs_java
def test_odd_captions_in_any_locale(tmp_path, monkeypatch):
    """Empty captions, separators and line breaks shift no line of the Java tools.

    A Turkish decimal sign is a comma, and a Turkish small I has no dot.
    """
    expected = scores, left_out = caption_scores(result_rows(ODD), ground_truth(tmp_path))
    assert "PTBTokenizer" not in left_out and "METEOR" not in left_out
    assert 0 < scores["METEOR"] < 1
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    assert caption_scores(result_rows(ODD), ground_truth(tmp_path)) == expected


@needs_java
def test_broken_meteor_ends(tmp_path, monkeypatch):
    """A METEOR that does not start is left out, and neither hangs nor leaves a process."""
    from pycocoevalcap.meteor import meteor

    started = []
    popen = meteor.subprocess.Popen
    monkeypatch.setattr(meteor, "METEOR_JAR", "absent.jar")
    monkeypatch.setattr(
        meteor.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    scores, left_out = caption_scores(result_rows(), ground_truth(tmp_path))
    assert "METEOR" in left_out and "CIDEr" in scores
    assert all(process.poll() is not None for process in started)


def test_simple_tokenizer():
    """Tokens are those of the PTB tokenizer, whose lines stand here."""
    pairs = {
        "The dog's ball isn't here, don't you see?": "the dog 's ball is n't here do n't you see",
        'Two people\'s hats; "quoted" (in brackets) & others': (
            "two people 's hats quoted -lrb- in brackets -rrb- & others"
        ),
        "A black-and-white cat, 3.5 years old - 10:30!": "a black-and-white cat 3.5 years old 10:30",
        "1,000 dogs... at U.S. street \u2013 \u201ccaf\u00e9\u201d": "1,000 dogs at u.s. street caf\u00e9",
        " . ": "",
    }
    assert {text: simple_tokenize(text) for text in pairs} == pairs


def test_domains(tmp_path, no_java):
    """Each domain is scored as a corpus of its own, next to the whole."""
    truth = ground_truth(tmp_path, domains=["in-domain", "in-domain", "out-domain", "out-domain"])
    scores, left_out = domain_scores(result_rows(), truth)
    assert list(scores) == ["in-domain", "out-domain", "overall"]
    assert scores["overall"] == caption_scores(result_rows(), truth)[0]
    assert scores["in-domain"]["CIDEr"] > scores["out-domain"]["CIDEr"]
    assert set(left_out) == {"PTBTokenizer", "METEOR", "SPICE"}
    assert list(domain_scores(result_rows(), ground_truth(tmp_path))[0]) == ["overall"]


def truth_of(folder, *rows, **more):
    file = folder / "own.json"
    file.write_text(json.dumps({"annotations": [dict(zip(("image_id", "caption"), row)) for row in rows], **more}))
    return file


def test_a2_lists_of_captions_are_read_and_empty_ones_are_counted(tmp_path, no_java):
    """A list gives the same score as a row for each; what is empty is left out and said."""
    rows = [(key, text) for key, texts in REFERENCES.items() for text in texts]
    expected = caption_scores(result_rows(), truth_of(tmp_path, *rows))[0]
    whole = truth_of(tmp_path, *REFERENCES.items(), (7, None), (7.0, ["", " "]), ("new", None), images=[{"id": "no"}])
    scores, notes = caption_scores(result_rows(), whole)
    assert scores == expected
    assert notes["ground truth"] == "4 empty captions and 2 images without captions are left out"
    with pytest.raises(UserError, match="every caption is empty"):
        caption_scores(result_rows(), truth_of(tmp_path, (7, None), (7, [])))


@pytest.mark.parametrize("caption", [3, True, float("nan"), {"raw": "a dog"}, [["a dog"]], ["a dog", 3]])
def test_a2_references_that_are_no_texts_are_refused(tmp_path, caption):
    with pytest.raises(UserError, match=r"annotation 1 \(the first is 0\) has the caption .*; expected a text"):
        caption_scores(result_rows(), truth_of(tmp_path, (7, "a"), (7, caption)))
    with pytest.raises(UserError, match="caption result 0 has the caption .*; expected a text"):
        caption_scores([{"image_id": 7, "caption": caption}], truth_of(tmp_path, (7, "a")))


@pytest.mark.parametrize("wrong", [None, True, 0.5, float("nan"), [1], {}, ""])
def test_a1_ids_of_references_and_results_are_ids(tmp_path, wrong):
    with pytest.raises(UserError, match=r"annotation 1 \(the first is 0\): an id is"):
        caption_scores(result_rows(), truth_of(tmp_path, (7, "a"), (wrong, "b")))
    with pytest.raises(UserError, match="caption results: row 0: an id is"):
        caption_scores([{"image_id": wrong, "caption": "a"}], truth_of(tmp_path, (7, "a")))


def test_a2_results_without_ground_truth_are_counted(tmp_path, no_java):
    rows = [*result_rows(), *({"image_id": key, "caption": "x"} for key in (7.0, 99, 100))]
    notes = caption_scores(rows, ground_truth(tmp_path))[1]
    assert notes["results"].startswith("2 captions of images without ground truth and 1 second captions")


def test_a2_a_corpus_of_one_image_is_said_to_have_no_cider(tmp_path, no_java):
    scores, notes = caption_scores([{"image_id": 7, "caption": "a dog"}], truth_of(tmp_path, (7, "a dog")))
    assert scores["CIDEr"] == 0 and "means nothing for one image" in notes["CIDEr"]
    truth = ground_truth(tmp_path, domains=["in-domain"] * 3 + ["out-domain"])
    assert list(domain_scores(result_rows(), truth)[1]) == ["PTBTokenizer", "out-domain: CIDEr", "METEOR", "SPICE"]


def test_a2_images_without_domain_are_counted(tmp_path, no_java):
    scores, notes = domain_scores(result_rows(), ground_truth(tmp_path, domains=["near", "near", None, "near"]))
    assert list(scores) == ["near", "overall"] and notes["domains"].startswith("1 of 4 images have none")


# Retrieval


def test_itm_eval_golden():
    """The released values on the released matrices."""
    golden = json.loads((GOLDEN / "golden.json").read_text())["itm_eval"]
    arrays = np.load(GOLDEN / "golden.npz")
    txt2img = {text: text // 3 for text in range(21)}
    img2txt = {image: [3 * image, 3 * image + 1, 3 * image + 2] for image in range(7)}
    sides = arrays["itm_eval/i2t"], arrays["itm_eval/t2i"]
    assert itm_eval(*sides, txt2img, img2txt) == pytest.approx(golden)
    # released way of ranking, written plainly
    orders = [list(np.argsort(row)[::-1]) for row in sides[0]]
    ranks = [min(order.index(text) for text in img2txt[image]) + 1 for image, order in enumerate(orders)]
    assert retrieval_scores(*sides, txt2img, img2txt)["txt_mdR"] == np.median(ranks)


def test_retrieval_by_hand():
    """Four videos, one text each: ranks 1, 2, 3, 4 for texts; 1, 1, 1, 2 for videos."""
    v2t = [[9, 1, 1, 1], [9, 5, 1, 1], [9, 8, 5, 1], [9, 8, 7, 5]]
    t2v = [[9, 1, 2, 3], [1, 9, 2, 3], [1, 2, 9, 3], [1, 2, 9, 3]]
    result = retrieval_scores(v2t, t2v, {n: n for n in range(4)}, {n: [n] for n in range(4)}, "vid")
    assert result == pytest.approx(
        {"txt_r1": 25, "txt_r5": 100, "txt_r10": 100, "txt_r_mean": 75, "txt_mdR": 2.5,
         "vid_r1": 75, "vid_r5": 100, "vid_r10": 100, "vid_r_mean": 275 / 3, "vid_mdR": 1,
         "r_mean": (75 + 275 / 3) / 2}
    )  # fmt: skip


def test_retrieval_ties_and_nan():
    """Equal scores do not all count as first, and scores that are not numbers are refused."""
    one = {n: n for n in range(4)}, {n: [n] for n in range(4)}
    same = np.full((4, 4), -100.0)
    assert itm_eval(same, same, *one)["txt_r1"] == 25
    with pytest.raises(UserError, match="NaN"):
        itm_eval(same * np.nan, same, *one)


# Visual question answering


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Ball.", "red ball"),
        ("  Two\tdogs\n", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("girl's", "girl's"),
        ("10:30", "10:30"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("5 o'clock", "5 o'clock"),
        ("its", "its"),
        ("hes", "he's"),
        ("$5 & 50%", "$5 & 50%"),
    ],
)
def test_normalized_answers(answer, expected):
    """Answers are compared in the spelling of the VQA definition, and it is final."""
    assert normalize_answer(answer) == expected == normalize_answer(expected)


def test_contractions_are_whole():
    """The table's keys lack one apostrophe, but for the official scorer's exception; no other word is touched."""
    regular = {key: value for key, value in CONTRACTIONS.items() if value != "somebodyd"}
    assert all(key.count("'") + 1 == value.count("'") for key, value in regular.items())
    assert all(key.replace("'", "") == value.replace("'", "") for key, value in regular.items())
    assert not {"hell", "shell", "well", "ill", "id", "im", "ive", "shes", "wed", "its", "were"} & CONTRACTIONS.keys()


WORDS = """yes no red dog the a an one Two ten none ZERO 3 10:30 1,000 2,5 3.5 t-shirt n/a girl's dont isnt couldnt've
couldn'tve yall'll y'allll hed've somebody'd lets shes Im Ive whats 'twas twas oclock ow's'at $5 & man,woman u.s. st.
etc.. a.b.c _x_ (left) [1] {b} =+ <b> what? no! \u00e9t\u00e9 \u0130 \u0661,\u0662 \uff01"""
# SHA-256 of what VQA v2's official scorer gives for these answers, 2,000 questions each
OFFICIAL = """d138365bb9895a04cd74beb7c7b83db5 9c80af5d62319d0f0df07342f4706900 55ef868f384a5bacc2261a46a43c600a
8bbf167f1a2f4f6a4c2c6186eea8c002 9d111ec6d6fb1f268db86c039df0a2ae f33b096b1df859312a50047c6b938f37
cfe0d8df7275a4a6fc29bafa42b56706 a4d4593860179391482dff4e7a3316c3 a1b0372fd2d567005f084b2d267fc1b5
e675be33488d96c45116f34533bfb8c7"""


def made_up_answers(part):
    """2,000 questions with a result and ten human answers each, made of few words so that many agree."""
    rng, vocabulary = random.Random(f"answers {part}"), WORDS.split()

    def make():
        words = [rng.choice(vocabulary) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        text = rng.choice((" ", " ", "  ", "\t", "\n", ", ", "-")).join(words)
        return rng.choice((str, str, str.upper, str.title, " {} ".format, "{}.".format, "the {}".format))(text)

    for _ in range(2000):
        few = [make() for _ in range(rng.choice((1, 1, 2, 3, 5)))]
        people = [rng.choice(few) for _ in range(10)]
        yield rng.choice((*few, rng.choice(few).lower(), make())), people


@pytest.mark.parametrize("part", range(10))
def test_a6_accuracies_are_the_official_scorers(part):
    """220,000 made-up answers, ten of eleven of them human ones."""
    values = [round(30 * answer_accuracy(said, people)) for said, people in made_up_answers(part)]
    assert 0.2 < sum(values) / len(values) / 30 < 0.8
    assert hashlib.sha256(bytes(values)).hexdigest()[:32] == OFFICIAL.split()[part]


def test_a6_normalization_is_skipped_where_all_people_agree():
    assert answer_accuracy("Yes.", ["yes"] * 10) == 0 and answer_accuracy("Yes.", ["Yes."] * 10) == 1
    assert answer_accuracy("Yes.", ["yes"] * 9 + ["YES"]) == 1
    assert answer_accuracy("yes\n", ["\tyes"] * 10) == 1


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_with_ten_people(matches, expected):
    """Known values of the mean over leaving one of ten out."""
    people = ["two"] * matches + ["other"] * (10 - matches)
    people[0] = {"two": "Two", "other": "Other"}[people[0]]  # where all agree to the letter nothing is normalized
    assert answer_accuracy("2", people) == pytest.approx(expected)


def test_accuracy_with_fewer_people():
    """One person decides alone; of two and three the others must agree."""
    assert answer_accuracy("the cat", ["cat"]) == 1 and answer_accuracy("dog", ["cat"]) == 0
    assert answer_accuracy("cat", ["cat", "cat"]) == 1
    assert answer_accuracy("cat", ["cat", "dog"]) == pytest.approx(0.5)
    assert answer_accuracy("cat", ["cat", "cat", "dog"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_vqa_accuracy_by_type():
    """The mean over questions, in all and by type; duplicates and unknown ids are left aside."""
    annotations = [
        {"question_id": 1, "answer": ["yes"] * 10, "answer_type": "yes/no", "question_type": "is the"},
        {
            "question_id": 2,
            "answer": ["3"] * 2 + ["4"] * 8,
            "answer_type": "number",
            "question_type": "how many",
        },
        {"question_id": 3, "answers": [{"answer": "no"}] * 10, "answer_type": "yes/no"},
    ]
    results = [(1, "yes"), ("2", "three"), (3, "yes"), (3, "no"), (99, "x")]
    results = [{"question_id": key, "answer": text} for key, text in results]
    scores = {"overall": 100 * 1.6 / 3, "yes/no": 50, "number": 60}
    assert vqa_accuracy(results, annotations) == pytest.approx(scores)
    more = vqa_accuracy(results, annotations, by=["answer_type", "question_type"])
    assert more == pytest.approx(scores | {"how many": 60, "is the": 100})
    assert vqa_accuracy(results, [{"question_id": 1, "answer": "yes"}]) == {"overall": 100}
    with pytest.raises(UserError, match=r"2 of 3.*2, 3"):
        vqa_accuracy(results[:1], annotations)
    for answers in ([], None, 3, ["x", None], [{"text": "x"}]):
        with pytest.raises(UserError, match="question 1 has the answers .*; expected a text, or a list of texts"):
            vqa_accuracy(results, [{"question_id": 1, "answer": answers}])


def test_a1_annotations_that_share_an_id_are_refused():
    results = [{"question_id": 1.0, "answer": "yes"}]
    rows = [{"question_id": 1, "answer": "yes"}, {"question_id": "1", "answer": "no"}]
    with pytest.raises(UserError, match="two VQA annotations share the question_id 1: .*'yes'.*'no'"):
        vqa_accuracy(results, rows)
    assert vqa_accuracy(results, rows[:1] * 2) == {"overall": 100}
    for wrong in (None, True, [1], float("nan"), 0.5):
        with pytest.raises(UserError, match="an id is"):
            vqa_accuracy(results, [{"question_id": wrong, "answer": "yes"}])
        with pytest.raises(UserError, match="an id is"):
            vqa_accuracy([{"question_id": wrong, "answer": "yes"}], rows[:1])
    with pytest.raises(UserError, match="a VQA result has the answer None"):
        vqa_accuracy([{"question_id": 1, "answer": None}], rows[:1])


# Classification


def test_accuracy_and_consistency():
    """Three of four right; of two sentences one is right throughout."""
    labels, sentences = [1, 0, 1, 0], ["s", "s", "t", "t"]
    assert accuracy([1, 0, 0, 0], labels) == 0.75
    assert accuracy(torch.tensor([[0.1, 0.9], [2, 1], [1, 0], [1, 0]]), torch.tensor(labels)) == 0.75
    assert consistency(sentences, [1, 0, 0, 0], labels) == 0.5
    assert consistency(sentences, [1, 1, 0, 0], labels) == 0
    with pytest.raises(ValueError, match="expected one for each"):
        accuracy([1], labels)
