"""Questions about clips: their formats, what the model reads of a clip, and the script."""

import json

import pytest
import torch
from scripts import TINY, run, settings

from data import build_datasets
from eval_vqa_video import score, video_tokens
from formula import MED_CONFIG, MODELS
from miniature.writing import write_miniature
from models.tokenizer import tokenize
from utils import UserError

pytest.importorskip("av")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 2, num_train=2, num_val=2, num_test=2, num_web=2, num_videos=3)


def dataset(folder, rows, clips=(), **more):
    """Questions in a folder with the named clips, which are not opened."""
    for name in clips:
        (folder / name).touch()
    (folder / "qa.json").write_text(json.dumps(rows))
    roots = dict(ann_root=str(folder), video_root=str(folder), test_file="qa.json", num_frm_test=2, image_size=16)
    return build_datasets("video_qa", roots | dict(inference="generate", video_map="", answer_list="") | more)["test"]


def test_questions_of_msrvtt(tmp_path):
    rows = [
        {"answer": "couch", "category_id": 14, "id": 7, "question": "What is it?", "video_id": 6513},
        {"answer": "two", "category_id": 14, "id": 8, "question": "how many are there?", "video_id": 6514},
        {"answer": "dog", "category_id": 14, "id": 9, "question": "who sits?", "video_id": 6513},
    ]
    found = dataset(tmp_path, rows, ["video6513.mp4", "video6514.avi"])
    assert found.files == ["video6513.mp4", "video6514.avi"] and len(found) == 2
    assert [[row["question_id"] for row in own] for own in found.questions] == [[7, 9], [8]]
    assert found.annotation[0] == {
        "question_id": 7, "question": "what is it?", "image": "video6513.mp4", "clip": 0, "answer": "couch"
    }  # fmt: skip


def test_questions_of_msvd(tmp_path):
    (tmp_path / "map.txt").write_text("-4wsuPCjDBc_5_15 vid1\nabc_0_9 vid2\n")
    rows = [{"answer": "someone", "id": 0, "question": "who runs?", "video_id": 2}]
    found = dataset(tmp_path, rows, ["abc_0_9.avi"], video_map=str(tmp_path / "map.txt"))
    assert found.path(0) == tmp_path / "abc_0_9.avi"
    rows[0]["video_id"] = 3
    with pytest.raises(UserError, match=r"entry 0 .*'video_id' is 3, and video_map has no vid3; correct video_map"):
        dataset(tmp_path, rows, video_map=str(tmp_path / "map.txt"))
    (tmp_path / "map.txt").write_text("abc vid1 x\n")
    with pytest.raises(UserError, match=r"map.txt, line 1: 3 words; expected '<name> vid<number>'"):
        dataset(tmp_path, rows, video_map=str(tmp_path / "map.txt"))


def test_clips_by_file_and_without_answers(tmp_path):
    found = dataset(tmp_path, [{"question_id": 1, "question": "why?", "video": "a.webm"}], ["a.webm"])
    assert found.files == ["a.webm"] and "answer" not in found.annotation[0]
    for row in ({"question": "why?"}, {"question": "why?", "video_id": True}, {"question": "why?", "video": ""}):
        with pytest.raises(UserError, match="expected the number or the name of a clip"):
            dataset(tmp_path, [row])
    with pytest.raises(UserError, match=r"1 of 1 files do not exist: \S*video5\.mp4"):
        dataset(tmp_path, [{"question": "why?", "video_id": 5}])
    with pytest.raises(UserError, match="test_file is ''; name the questions"):
        dataset(tmp_path, [], test_file="")


def test_a_clip_of_one_repeated_frame_reads_as_the_image():
    """Attention over equal tokens is attention over one of them."""
    torch.manual_seed(0)
    vit = dict(embed_dim=48, depth=2, num_heads=4, patch_size=16)
    model = MODELS["vqa"](med_config=MED_CONFIG, image_size=48, vit=vit).eval()
    image, other = torch.randn(2, 1, 3, 48, 48)
    text = tokenize(model.tokenizer, ["what is it"], "enc")
    with torch.no_grad():
        tokens = video_tokens(model, torch.stack((image, image, image), dim=1))
        assert tokens.shape == (1, 3 * 10, 48)
        states = model.text_encoder(*text, model.text_encoder.project(tokens))
        torch.testing.assert_close(states, model.question_states(image, text), rtol=1e-5, atol=1e-5)
        both = video_tokens(model, torch.stack((image, other), dim=1))
        torch.testing.assert_close(both, torch.cat([model.visual_encoder(x) for x in (image, other)], dim=1))
        assert not torch.allclose(model.text_encoder(*text, model.text_encoder.project(both)), states, atol=1e-3)


def test_scores_by_kind():
    truth = [
        {"question_id": 1, "question": "what is it", "answer": "dog"},
        {"question_id": 2, "question": "what color", "answer": "red"},
        {"question_id": 3, "question": "how many", "answer": "2"},
    ]
    rows = [{"question_id": i, "answer": text} for i, text in ((1, "dog"), (2, "blue"), (3, "2"))]
    assert score(rows, truth) == {"overall": pytest.approx(200 / 3), "what": 50.0, "how": 100.0}
    assert score(rows, []) == {}


@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_the_script_on_one_and_two_processes(world, tmp_path, inference):
    bad = world / "videos/video1.mp4"
    whole = bad.read_bytes()
    bad.write_bytes(b"no video")
    sizes = [part for value in TINY for part in ("--set", value)]
    values = dict(video_root=world / "videos", ann_root=world / "annotations", pretrained="''", k_test=4, batch_size=5)
    found = []
    try:
        for processes in (1, 2):
            out = tmp_path / str(processes)
            words = ["--config", "configs/miniature/video_qa.yaml", "--output_dir", out, *sizes]
            run("eval_vqa_video.py", *words, *settings(**values, inference=inference), processes=processes)
            scores = json.loads((out / "evaluate.txt").read_text())
            found.append((scores, json.loads((out / "result/video_qa.json").read_text())))
    finally:
        bad.write_bytes(whole)
    scores, rows = found[0]
    assert found[0] == found[1]
    questions = json.loads((world / "annotations/msrvtt_qa_test.json").read_text())
    assert {row["question_id"] for row in rows} == {row["id"] for row in questions} and "test_overall" in scores
    unread = {row["id"] for row in questions if row["video_id"] == 1}
    assert {row["question_id"] for row in rows if row["answer"] == ""} >= unread
    assert "video1.mp4" in (tmp_path / "1/report.html").read_text()


def test_other_inference_is_refused(tmp_path):
    done = run(
        "eval_vqa_video.py", "--config", "configs/miniature/video_qa.yaml", "--output_dir", tmp_path,
        *settings(inference="choices"), check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "inference is 'choices'; expected one of 'generate', 'rank'" in done.stderr
