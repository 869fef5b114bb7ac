"""Whatever a file or text holds: a clear error in one line or a right result, never a stack trace, never a hang."""

import json
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from data.coco_flickr import CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.nlvr import NLVR
from data.pretrain import PairDataset
from data.text import pre_caption, pre_question
from data.transforms import test_transform as square
from data.video import VideoDataset
from data.vqa import VQATest, VQATrain, read_answers
from files import read_json, write_json
from inference.inputs import find_images, read_texts
from launch.config import CaptionConfig, PretrainConfig
from launch.run import Run
from launch.settings_file import load_config, save_config
from metrics.caption import caption_scores, domain_scores
from metrics.vqa import normalize_answer, vqa_accuracy
from models.architecture import settings_of
from models.pretrained import load_pretrained
from models.tokenizer import init_tokenizer, tokenize
from models.weights import read_file
from training.checkpoint import load_last, save_last
from utils import UserError, user_message

MOST_SECONDS = 10  # of one example; most take a few milliseconds
CPU = torch.device("cpu")


def examples(number):
    """Always the same examples, and none too slow."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return hypothesis_settings(
        max_examples=number, derandomize=True, deadline=None, suppress_health_check=checks, phases=[Phase.generate]
    )


@contextmanager
def clear():
    """Let a UserError pass whose message is one line, and nothing else; end what hangs."""

    def hangs(*_):
        raise TimeoutError(f"more than {MOST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    except UserError as error:
        message = user_message(error)
        assert message and "\n" not in message and len(message) < 2000, message
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jpg", "b.jpg"):
            Image.new("RGB", (4, 4)).save(Path(folder, name))
        Path(folder, "clip.mp4").write_bytes(b"no video")
        yield Path(folder)


# What stands in JSON files: anything, and often nearly what belongs there.

ANY_TEXT = st.text(st.characters(), max_size=12)  # lone surrogates and control characters included
TEXT = st.sampled_from(["a.jpg", "b.jpg", "x", "", "a dog. (it runs)", "True", "vqa", "vg", "0", "a\0b", "\ud800",
                        "../a.jpg", "x" * 300, "/"]) | ANY_TEXT  # fmt: skip
SCALAR = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXT
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=5)
NAME = st.sampled_from(["a.jpg"] * 8 + ["b.jpg"]) | VALUE


def mostly(usual):
    """A strategy that is usually the given one, else anything."""
    return st.integers(0, 19).flatmap(lambda n: VALUE if n == 7 else usual)


WHOLE = st.fixed_dictionaries(
    {
        "image": mostly(st.sampled_from(["a.jpg", "b.jpg"])),
        "images": mostly(st.lists(st.sampled_from(["a.jpg", "b.jpg"]), min_size=2, max_size=2)),
        "caption": mostly(TEXT),
        "image_id": mostly(st.integers(0, 2) | TEXT),
        "question": mostly(TEXT),
        "question_id": mostly(st.integers(0, 2) | TEXT),
        "answer": mostly(TEXT | st.lists(TEXT, max_size=3)),
        "answers": mostly(st.lists(st.fixed_dictionaries({"answer": TEXT}), max_size=2)),
        "answer_type": mostly(TEXT),
        "sentence": mostly(TEXT),
        "label": mostly(st.sampled_from(["True", "False"])),
        "dataset": mostly(st.sampled_from(["vqa", "vg"])),
        "clip_name": mostly(st.just("clip")),
        "url": mostly(TEXT),
    },
)
FIELDS = ["image", "images", "caption", "image_id", "question", "question_id", "answer", "sentence", "label", "dataset"]
ENTRY = st.tuples(WHOLE, st.integers(0, 30)).map(
    lambda pair: {key: value for key, value in pair[0].items() if key not in FIELDS[pair[1] : pair[1] + 1]}
)
ROWS = mostly(st.lists(mostly(ENTRY), min_size=1, max_size=3))
# nesting too deep for the reader, numbers too long for it, another encoding, a file cut anywhere
ODD_BYTES = st.binary(max_size=40) | st.sampled_from(
    [b"[" * 100_000, b'[{"a":' * 50_000, b"[" + b"9" * 5000 + b"]", b"\xff\xfe[\0]\0", b"", b"\0", b"[NaN, 1e999]"]
)
AS_LIST = ROWS.map(json.dumps).map(str.encode)
AS_LINES = st.lists(ENTRY, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
CUT = st.tuples(AS_LIST, st.floats(0, 1)).map(lambda pair: pair[0][: int(len(pair[0]) * pair[1])])
FILES = st.integers(0, 9).flatmap(lambda n: [CUT, ODD_BYTES, AS_LINES][n] if n < 3 else AS_LIST)

DATASETS = {
    "caption": lambda file, root: CaptionTrain(file, root, square(8)),
    "caption_eval": lambda file, root: CaptionEval(file, root, square(8)),
    "retrieval": lambda file, root: RetrievalTrain(file, root, square(8)),
    "retrieval_eval": lambda file, root: RetrievalEval(file, root, square(8)),
    "vqa": lambda file, root: VQATrain([file], {"vqa": root, "vg": root}, square(8)),
    "vqa_test": lambda file, root: VQATest(file, {"vqa": root, "vg": root}, square(8)),
    "nlvr": lambda file, root: NLVR(file, root, square(8), True),
    "video": lambda file, root: VideoDataset(file, root, 2, 8),
    "pairs": lambda file, root: PairDataset([file], root, square(8)),
    "answers": lambda file, root: read_answers(file),
    "list": lambda file, root: read_texts(Path(file), "image"),
    "images": lambda file, root: find_images([file]),
}


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("name", DATASETS)
@examples(40)
@given(content=FILES)
def test_annotations(root, name, ending, content):
    with tempfile.TemporaryDirectory() as folder, clear():
        file = Path(folder, f"rows.{ending}")
        file.write_bytes(content)
        found = DATASETS[name](str(file), str(root))
        assert len(found) > 0 or name == "list"
        for number in range(len(found)):
            assert found[number] is not None


# Configurations.

KEYS = st.sampled_from(["batch_size", "init_lr", "vit", "prompt", "java", "image_root", "vit.depth", "vit.a.b", "", ".",
                        "train_file", "<<", "a"]) | ANY_TEXT  # fmt: skip
LINE = st.tuples(KEYS, st.sampled_from([": ", ":", " : ", ""]), TEXT | st.sampled_from(
    ["1", "1.5", "true", "null", "[1, 2]", "{a: 1}", "&a [*a]", "*a", "!!python/object:os.system x", "!x 1",
     "2020-01-01", "'", "1e3", "? [a] : b", "|", ">-", "{? {a: b} : c}", "!!binary eA==", "!!set {a}", "!!omap [a: 1]",
     "0x_", "9" * 5000, "[" * 2000, "&a {<<: *a}", "? " * 200, "- " * 400,
     "{a: &a [1, 1], b: &b [*a, *a], c: [*b, *b]}",
     "[" + "&a [*a], " * 30 + "]", "%YAML", "---", "!!int x", "!!float y", "!!timestamp z"])).map("".join)
YAMLS = st.lists(LINE, max_size=4).map("\n".join)


@examples(400)
@given(text=YAMLS.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=30),
       overrides=st.lists(LINE.map(lambda line: line.replace(": ", "=")), max_size=2),
       kind=st.sampled_from([CaptionConfig, PretrainConfig]))  # fmt: skip
def test_configurations(text, overrides, kind):
    with tempfile.TemporaryDirectory() as folder, clear():
        file = Path(folder, "a.yaml")
        file.write_bytes(text)
        config = load_config(kind, file, overrides)
        save_config(config, Path(folder, "b.yaml"))
        assert load_config(kind, Path(folder, "b.yaml")) == config


# Checkpoints.


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("checkpoints"), Small()
    torch.save({"model": model.state_dict(), "config": {"vit": "base"}}, folder / "a.pth")
    torch.save({"model": model.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), folder / "a.safetensors", {"config": '{"vit": "base"}'})
    save_last(folder, {"model": model.state_dict(), "epoch": 1}, CPU)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


@pytest.mark.parametrize("name", ["a.pth", "old.pth", "a.safetensors", "checkpoint_last.pth"])
@examples(150)
@given(changes=CHANGES, share=st.just(1.0) | st.floats(0, 1))
def test_damaged_checkpoints(checkpoints, name, changes, share):
    content = bytearray(checkpoints[name])
    for place, value in changes:
        content[int(place * len(content))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content[: int(len(content) * share)])
        with clear():
            settings_of(str(path))
        with clear():
            load_pretrained(Small(), str(path), "caption")
        with clear():
            load_last(path, CPU)


TENSOR = st.sampled_from([torch.zeros(2), torch.zeros(2, 2), torch.zeros(()), torch.zeros(1, 5, 3, dtype=torch.int8)])
ENTRIES = st.dictionaries(
    st.sampled_from(["a.weight", "a.bias", "b.weight", "b.bias", "visual_encoder.pos_embed", "vision_proj.weight",
                     "visual_encoder.patch_embed.proj.weight", "text_encoder.embeddings.word_embeddings.weight",
                     "text_encoder.encoder.layer.0.intermediate.dense.weight", "vision_model.x", "model", "config",
                     "text_encoder.embeddings.position_embeddings.weight", "rng", "progress"]),
    TENSOR | st.sampled_from(["x", 1, None, {"vit": 3}, {"vit": {}}, [], {"med_config": 4}]), max_size=9,
)  # fmt: skip


@examples(250)
@given(inner=ENTRIES | SCALAR, outer=ENTRIES)
def test_checkpoints_of_anything(inner, outer):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pth")
        torch.save({**outer, "model": inner} if outer else inner, path)
        with clear():
            settings_of(str(path))
        with clear():
            load_pretrained(Small(), str(path), "caption")
        with clear():
            load_last(path, CPU)


# Texts and the vocabulary.


@pytest.fixture(scope="module")
def tokenizer():
    return init_tokenizer()


@examples(300)
@given(texts=st.lists(TEXT | st.text(max_size=200), min_size=1, max_size=3),
       first=st.sampled_from(["cls", "enc", "dec"]), most=st.none() | st.integers(3, 12))  # fmt: skip
def test_tokens_of_any_text(tokenizer, texts, first, most):
    batch = tokenize(tokenizer, texts, first, most)
    assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.input_ids) == len(texts)
    assert most is None or batch.input_ids.shape[1] <= most
    start = {"cls": tokenizer.cls_token_id, "enc": tokenizer.enc_token_id, "dec": tokenizer.bos_token_id}[first]
    assert (batch.input_ids[:, 0] == start).all() and batch.input_ids.max() < len(tokenizer)
    ends = batch.input_ids.gather(1, batch.attention_mask.sum(1, keepdim=True) - 1)
    assert (ends == tokenizer.sep_token_id).all()


@examples(300)
@given(text=st.text(max_size=60), most=st.integers(1, 8))
def test_cleaned_texts(text, most):
    for clean in (pre_caption, pre_question):
        assert len(clean(text, most).split(" ")) <= most and not set(clean(text, most)) & set('.!"()*#:;~')
    assert pre_caption(pre_caption(text, most), most) == pre_caption(text, most)
    assert normalize_answer(normalize_answer(text)) is not None


@examples(60)
@given(content=st.binary(max_size=30) | st.lists(st.sampled_from(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "",
       "##b", "[DEC]", "\u2028"]), max_size=9).map(lambda tokens: "\n".join(tokens).encode()))  # fmt: skip
def test_vocabularies(content):
    with tempfile.TemporaryDirectory() as folder, clear():
        Path(folder, "vocab.txt").write_bytes(content)
        found = init_tokenizer(Path(folder, "vocab.txt"))
        assert tokenize(found, "a b", "enc").input_ids[0, 0] == found.enc_token_id


# Results.


@examples(150)
@given(rows=st.lists(st.fixed_dictionaries({"image_id": st.integers() | TEXT, "caption": TEXT}), max_size=3))
def test_results_are_read_as_written(rows):
    with tempfile.TemporaryDirectory() as folder:
        assert read_json(write_json(Path(folder, "result", "a.json"), rows)) == rows


@examples(100)
@given(truth=FILES | st.fixed_dictionaries({"annotations": ROWS, "images": ROWS}).map(json.dumps).map(str.encode),
       results=st.lists(ENTRY, max_size=3))  # fmt: skip
def test_scores_of_any_ground_truth(truth, results):
    with tempfile.TemporaryDirectory() as folder, clear():
        file = Path(folder, "truth.json")
        file.write_bytes(truth)
        whole = caption_scores(results, file, java=False)[0]
        for scores in (whole, *domain_scores(results, file, java=False)[0].values()):
            assert all(value == value for value in scores.values())


@examples(100)
@given(results=st.lists(ENTRY, max_size=3), annotations=st.lists(ENTRY, max_size=3))
def test_accuracy_of_any_answers(results, annotations):
    with clear():
        assert all(0 <= value <= 100 for value in vqa_accuracy(results, annotations).values())


@examples(100)
@given(tail=st.binary(max_size=20) | st.sampled_from([b'{"epoch": 1', b"}", b'{"epoch": 9}', b"[1}", b"\xff}"]))
def test_logs_with_a_damaged_end(tail):
    with tempfile.TemporaryDirectory() as folder, clear():
        run = Run(Path(folder), CPU)
        Path(folder, "log.txt").write_bytes(b'{"epoch": 0, "loss": 1.5}\n' + tail)
        run.trim_log(lambda row: row["epoch"] < 1)
        assert run.read_log() == [{"epoch": 0, "loss": 1.5}]


def test_unreadable_state_dicts_end_in_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path / "a.safetensors")
