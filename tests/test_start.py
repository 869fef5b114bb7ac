"""What is known before the first step, Ctrl-C during the start, odd command lines and texts, and other systems."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, TINY, environment, run_here, settings
from test_imports import ROOMS, files

from launch.config import CaptionConfig
from launch.run import LAST
from miniature.writing import write_miniature
from models.blip import BLIP_Decoder
from processes import run_script, start
from train_caption import check_captions
from training.checkpoint import check_space
from utils import UserError, say

MODEL = ROOT / "configs/miniature/model.safetensors"
SHORT = {"batch_size": 20, "max_length": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_miniature(folder, 3, num_train=8, num_val=4, num_test=4, num_web=0, num_videos=0)


def caption_words(world, folder, **more):
    annotations = world / "annotations"
    values = dict(image_root=world, ann_root=annotations, coco_gt_root=annotations, pretrained="''", max_epoch=1)
    sizes = [part for value in TINY for part in ("--set", value)]
    words = ["--config", "configs/miniature/caption.yaml", "--output_dir", folder, *sizes]
    return [*map(str, words), *settings(**values | dict(batch_size=4, java="false") | more)]


# 18.C: known before the first step


@pytest.fixture
def tiny():
    text = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BLIP_Decoder(vit=dict(embed_dim=16, depth=1, num_heads=2, patch_size=16), med_config=text, image_size=32)


def test_18_c_a_prompt_that_fills_the_caption(tiny):
    assert check_captions(tiny, CaptionConfig(max_length=5, min_length=1)).keys() <= {"METEOR", "SPICE"}
    with pytest.raises(UserError, match="prompt has 4 tokens and max_length is 4; raise max_length"):
        check_captions(tiny, CaptionConfig(max_length=4, min_length=1))


def test_18_c_a_long_prompt_ends_before_the_first_step(world, tmp_path):
    code, told = run_here("train_caption.py", *caption_words(world, tmp_path, max_length=3, min_length=1))
    assert code == 2 and told.splitlines()[-1].startswith("error: prompt has 4 tokens"), told
    assert not (tmp_path / "curve.jsonl").exists()


def test_18_c_java_is_missed_before_the_first_step(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("metrics.caption.shutil.which", lambda name: None)
    order = []
    monkeypatch.setattr("launch.run.Run.print", lambda run, text: order.append(text))
    monkeypatch.setattr("training.loop.take_step", lambda *_: order.append("step") or {"loss": torch.tensor(1.0)})
    code, told = run_here("train_caption.py", *caption_words(world, tmp_path, java="true"))
    assert code == 0, told
    assert [text.split(":")[0] for text in order[: order.index("step")]] == ["METEOR", "SPICE"]
    assert "no `java` was found on the PATH" in order[0] and order.count(order[0]) == 1


def test_18_c_room_for_two_checkpoints(tmp_path, monkeypatch):
    """Two of the last and one of the best: 2 x (weights and two moments) and the weights, in float32."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    state, free = SimpleNamespace(model=model), [28_000_000]
    monkeypatch.setattr("training.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    check_space(state, tmp_path)
    free[0] -= 1
    with pytest.raises(UserError, match="checkpoints need 0.028 GB more in .*, and 0.028 are free; free space, or"):
        check_space(state, tmp_path)
    (tmp_path / LAST).write_bytes(bytes(12_000_000))  # of the run that goes on
    check_space(state, tmp_path)


def test_18_c_a_full_disk_is_known_before_the_first_step(world, tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    code, told = run_here("train_caption.py", *caption_words(world, tmp_path))
    assert code == 2 and told.count("\n") == 1 and told.startswith("error: checkpoints need 0."), told


# 18.E: no stack trace, no misleading message

INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def heed_interrupts():
    """Undo what a shell does to commands in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("moment", ["torch", "training.loop"])
def test_18_e_ctrl_c_during_imports(world, tmp_path, moment):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(moment=moment), encoding="utf-8")
    env = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = [sys.executable, "train_caption.py", *caption_words(world, tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, preexec_fn=heed_interrupts)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


def run_interrupted(moment, words, folder):
    """Run a script in a process that has imported its modules."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(INTERRUPT.format(moment=moment), {})
    run_script(words, 1, folder, environment())


def test_18_e_ctrl_c_during_the_start(world, tmp_path):
    """After the model has been made, when a module is imported that only this run needs."""
    words = [ROOT / "train_caption.py", *caption_words(world, tmp_path / "run", tensorboard="true")]
    process = start(run_interrupted, "torch.utils.tensorboard", words, tmp_path)
    process.join()
    assert (process.exitcode, (tmp_path / "stderr").read_text()) == (130, "\ninterrupted\n")


def test_18_e_every_script_handles_ctrl_c_before_its_imports():
    scripts = [path for path in ROOT.glob("*.py") if "sys.exit(launch(" in path.read_text(encoding="utf-8")]
    assert len(scripts) == 11
    for path in scripts:
        code = path.read_text(encoding="utf-8").split('"""', 2)[2]
        assert code.startswith("\n\nfrom launch.interrupts import end_on_interrupt\n\nif __name__ =="), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config.yaml"], "config.yaml is no option; give a file of settings as --config config.yaml"),
        (["max_epoch=3"], "max_epoch=3 is no option; give a setting as --set max_epoch=3"),
        (["--max_epoch", "3"], "--max_epoch is no option; give a setting as --set max_epoch=VALUE"),
        (["--set", "prompt=caf\udce9"], "--set 'prompt=caf\\udce9': prompt is not UTF-8 text; write it in UTF-8"),
        (["--evalute"], "--evalute is no option; did you mean --evaluate?"),
        (["--set", "bacth_size=3"], "--set bacth_size=3: unknown key 'bacth_size'; did you mean 'batch_size'?"),
        (["--set", "batch_size=4", "warmup=x"], "--set warmup=x: warmup is a text ('x'); expected a whole number"),
    ],
)
def test_18_e_odd_command_lines(words, message, tmp_path):
    for order in ([*words, "--output_dir", tmp_path], ["--output_dir", tmp_path, *words]):
        code, told = run_here("train_caption.py", *order)
        assert (code, told) == (2, f"error: {message}\n")


def with_lone_surrogates(world, folder):
    """Copy the annotations, with half of a pair in every text, as programs write that cut UTF-16."""
    folder.mkdir()
    for path in (world / "annotations").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        (folder / path.name).write_text(json.dumps(spoilt(content)), encoding="utf-8")
    return folder


def spoilt(value, key=None):
    if isinstance(value, dict):
        return {name: spoilt(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoilt(item, key) for item in value]
    texts = ("caption", "question", "answer", "sentence", "text", "questions", "answers")
    return f"{value} \ud83d red" if key in texts and isinstance(value, str) else value


SURROGATES = {
    "train_caption.py": ("caption", {"batch_size": 4, "java": "false"}),
    "train_retrieval.py": ("retrieval", {"batch_size_train": 4, "queue_size": 8, "k_test": 2, "embed_dim": 8}),
    "train_nlvr.py": ("nlvr", {"batch_size_train": 4}),
    "train_vqa.py": ("vqa", {"batch_size_train": 4}),
    "train_classification.py": ("classification", {"batch_size_train": 4}),
    "train_dialogue.py": ("dialogue", {"batch_size_train": 4}),
    "pretrain.py": ("pretrain", {"batch_size": 4, "queue_size": 8, "embed_dim": 8}),
}


@pytest.mark.parametrize("script", SURROGATES)
def test_18_e_lone_surrogates_in_texts(world, tmp_path, script):
    """Training, evaluation, result files and report."""
    task, values = SURROGATES[script]
    annotations = with_lone_surrogates(world, tmp_path / "annotations")
    values |= {"image_root": world, "ann_root": annotations, "pretrained": "''", "max_epoch": 1}
    values |= {"caption": {"coco_gt_root": annotations}, "vqa": {"vqa_root": world, "vg_root": world}}.get(task, {})
    if task == "pretrain":
        values = values | {"train_file": f"[{annotations / 'pretrain_human.json'}]"}
        del values["ann_root"]
    words = ["--config", ROOT / f"configs/miniature/{task}.yaml", "--output_dir", tmp_path / "run"]
    words += [part for value in TINY for part in ("--set", value)]
    code, told = run_here(script, *words, *settings(**values))
    assert code == 0 and (tmp_path / "run/report.html").exists(), told


def test_18_e_a_full_disk_under_both_streams_does_not_end_a_run(world, tmp_path):
    words = [sys.executable, "train_caption.py", *caption_words(world, tmp_path, **SHORT)]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, cwd=ROOT, env=environment(), stdout=full, stderr=full)
    assert done.returncode == 0 and (tmp_path / "report.html").exists()


def test_18_e_a_reader_that_has_gone_does_not_end_a_run():
    code = "import sys, utils\nfor _ in range(3): utils.say('text', sys.stdout)\nutils.say('end')"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"end\n"
    assert process.returncode == 0


def test_18_e_characters_that_a_terminal_lacks(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        say("un caf\u00e9 \ud83d", log)
    assert (tmp_path / "log").read_text(encoding="ascii") == "un caf? ?\n"


# 18.F: Windows and macOS


def test_18_f_modules_training_and_prediction_without_what_other_systems_lack(world, tmp_path):
    """All modules are imported; data workers are started by `spawn`, so dataset and collate function are pickled."""
    rooms = [path.relative_to(ROOT).with_suffix("") for room in ROOMS for path in files(room)]
    names = {".".join(path.parts).removesuffix(".__init__") for path in rooms if path.stem != "__main__"}
    image, output = next((world / "images").rglob("*.*")), tmp_path / "captions.jsonl"
    words = ["import", *(path.stem for path in ROOT.glob("*.py")), *sorted(names)]
    words += ["then", "train_caption", *caption_words(world, tmp_path, num_workers=1, **SHORT)]
    words += ["then", "predict", "caption", image, "--checkpoint", MODEL, "--output", output, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/other_system.py", *map(str, words)],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert (tmp_path / "report.html").exists()
    assert json.loads(output.read_text(encoding="utf-8").splitlines()[-1])["captions"]
