"""The miniature world on disk: images of coloured shapes, and annotations in every released file format."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from data.publishers import ground_truth
from files import write_json
from miniature import text
from miniature.dialogue import dialogues
from miniature.scene import LEVELS, Scene, draw_scene, render, seen_pairs, unseen_pairs
from utils import UserError, track

UNSEEN_SHARE = 0.12  # of test images
TRIES = 1000  # consecutive draws without a new result before giving up
FIRST_ID = {"train": 1, "val": 1_000_001, "test": 2_000_001, "web": 3_000_001}


def write_miniature(
    folder: str | Path,
    level: int = 4,
    seed: int = 0,
    num_train: int = 6000,
    num_val: int = 300,
    num_test: int = 500,
    num_web: int = 6000,
    num_videos: int = 0,
    image_size: int = 64,
) -> Path:
    """Write the world; the same arguments give the same bytes.

    Levels: 1 has one object on a plain background; 2 one or two; 3 up to three; 4 textured backgrounds as well.

    Raises UserError for another level, or more test images than the level has different scenes.
    """
    if level not in LEVELS:
        raise UserError(f"level is {level}; expected one of {', '.join(map(str, LEVELS))}")
    folder = Path(folder)
    counts = {"train": num_train, "val": num_val, "test": num_test, "web": num_web}
    splits = {split: make_scenes(split, count, level, seed) for split, count in counts.items()}
    for split, scenes in splits.items():
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(track(scenes, f"{split} images")):
            render(scene, image_size).save(folder / image(split, i), quality=95)
    write_json(folder / "scenes.json", {image(s, i): asdict(x) for s, xs in splits.items() for i, x in enumerate(xs)})
    annotations = folder / "annotations"
    kinds = write_captions, write_questions, write_choices, write_statements, write_entailment, write_dialogues
    for split, write in product(("train", "val", "test"), kinds):
        write(annotations, split, splits[split], seed)
    write_json(annotations / "answer_list.json", text.answer_list())
    write_nocaps(annotations, splits["test"], seed)
    write_web(annotations, splits["web"], seed)
    if num_videos:
        from miniature.video import write_videos

        write_videos(folder, annotations, num_videos, seed, image_size)
    return folder


def image(split: str, index: int) -> str:
    """Return an image's path relative to the folder; it ends in the image's id."""
    return f"images/{split}/{image_id(split, index):07d}.jpg"


def image_id(split: str, index: int) -> int:
    """Return an image's id, unique in the world."""
    return FIRST_ID[split] + index


def generator(*names: Any) -> random.Random:
    """Return a random number generator seeded by the given names."""
    return random.Random("/".join(map(str, names)))


def make_scenes(split: str, count: int, level: int, seed: int) -> list[Scene]:
    """Draw the scenes of a split; no two test scenes show the same objects."""
    scenes: list[Scene] = []
    known: set[Any] = set()
    rng, misses = generator(seed, level, split), 0
    while len(scenes) < count:
        unseen = split == "test" and rng.random() < UNSEEN_SHARE
        scene = draw_scene(rng, level, unseen)
        key = distinct_key(scene)
        if split != "test" or key not in known:
            scenes.append(scene)
            known.add(key)
            misses = 0
        elif (misses := misses + 1) > TRIES:
            raise UserError(f"level {level} has fewer than {count} different test scenes; ask for fewer")
    return scenes


def distinct_key(scene: Scene) -> Any:
    """Return the facts that a full caption states; for a single object they include size and position."""
    if len(scene.items) == 1:
        item = scene.items[0]
        return item.pair, item.size, text.position(item)
    return frozenset(scene.pairs)


def write_captions(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write captions in COCO's format for captioning, and more detailed ones in Flickr30k's for retrieval."""
    ids = [image_id(split, i) for i in range(len(scenes))]
    for prefix, sized in (("coco_karpathy", False), ("flickr30k", True)):
        rng = generator(seed, prefix, split)
        listed = [text.captions(scene, rng, sized) for scene in scenes]
        rows = [{"image": image(split, i), "caption": captions} for i, captions in enumerate(listed)]
        if split == "train":
            pairs = [{"image": row["image"], "caption": caption} for row in rows for caption in row["caption"]]
            if not sized:
                write_json(folder / "pretrain_human.json", pairs)
            rows = [pair | {"image_id": f"{prefix}_{int(Path(pair['image']).stem)}"} for pair in pairs]
        elif not sized:
            write_json(folder / f"{prefix}_{split}_gt.json", ground_truth(ids, listed))
        write_json(folder / f"{prefix}_{split}.json", rows)


def write_questions(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write questions with ten answers; every eighth training image has Visual Genome questions with one answer."""
    rng = generator(seed, "vqa", split)
    rows: dict[str, list[dict[str, Any]]] = {"vqa": [], "vg": []}
    for i, scene in enumerate(scenes):
        dataset = "vg" if split == "train" and i % 8 == 0 else "vqa"
        for number, question in enumerate(text.questions(scene, rng, 4)):
            row = {
                "dataset": dataset,
                "image": image(split, i),
                "question": question.text,
                "question_id": image_id(split, i) * 10 + number,
                "answer": question.answer if dataset == "vg" else text.ten_answers(question, rng),
                "answer_type": question.kind,
            }
            rows[dataset].append(row)
    write_json(folder / f"vqa_{split}.json", rows["vqa"])
    if split == "train":
        write_json(folder / "vg_qa.json", rows["vg"])


def write_choices(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write questions in A-OKVQA's format, with ten answers and four choices, OK-VQA's, with ten, and GQA's, with one.

    OK-VQA's files are as published: questions, annotations, and numbers of images instead of names.
    """
    rng, names = generator(seed, "choices", split), [" ".join(pair) for pair in seen_pairs()]
    direct, exact, asked_about, people_said = [], [], [], []
    for i, scene in enumerate(scenes):
        for number, question in enumerate(text.questions(scene, rng, 4)):
            asked = {"image": image(split, i), "question": question.text}
            asked["question_id"] = f"{image_id(split, i)}-{number}"
            group = next((group for group in text.GROUPS if question.answer in group), names)
            choices = text.options(question.answer, group, 4, rng)
            right = choices.index(question.answer)
            people = {"direct_answers": text.ten_answers(question, rng), "difficult_direct_answer": False}
            direct.append(asked | people | {"choices": choices, "correct_choice_idx": right})
            exact.append(asked | {"answer": question.answer, "fullAnswer": question.answer})
            numbers = {"image_id": image_id(split, i), "question_id": image_id(split, i) * 10 + number}
            asked_about.append(numbers | {"question": question.text})
            answers = [
                {"answer_id": n, "raw_answer": text, "answer": text, "answer_confidence": "yes"}
                for n, text in enumerate(people["direct_answers"], 1)
            ]
            people_said.append(numbers | {"question_type": "other", "answer_type": question.kind, "answers": answers})
    write_json(folder / f"aokvqa_v1p0_{split}.json", direct)
    write_json(folder / f"gqa_{split}.json", exact)
    write_json(folder / f"okvqa_{split}_questions.json", {"data_subtype": split, "questions": asked_about})
    write_json(folder / f"okvqa_{split}_annotations.json", {"data_subtype": split, "annotations": people_said})


def write_statements(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write statements about two images, each judged for two true and two false pairs.

    Outside training every statement occurs once: consistency takes all pairs of one sentence together.
    """
    rng = generator(seed, "nlvr", split)
    pairs = seen_pairs() + (sorted(unseen_pairs()) if split == "test" else [])
    rows: list[dict[str, Any]] = []
    used, misses = set[str](), 0
    while len(rows) < 2 * len(scenes) and misses < TRIES:
        made = text.statement(rng, pairs)
        judged = [] if made.text in used else text.judged_pairs(made, scenes, rng)
        misses = 0 if judged else misses + 1
        if judged and split != "train":
            used.add(made.text)
        for left, right, truth in judged:
            images = [image(split, left), image(split, right)]
            rows.append({"images": images, "sentence": made.text, "label": str(truth)})
    write_json(folder / f"nlvr_{'dev' if split == 'val' else split}.json", rows)


def write_entailment(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write sentences that an image makes true, makes false or leaves open, in SNLI-VE's format.

    A still image leaves open whether an object moves; a moving object that is not there is as false as a still one.
    """
    rng, rows = generator(seed, "entailment", split), []
    for i, scene in enumerate(scenes):
        present, absent = " ".join(rng.choice(scene.items).pair), " ".join(text.absent_pair(scene, rng))
        motion = f" moving {rng.choice(('up', 'down', 'left', 'right'))}"
        false = absent + rng.choice(("", motion))
        sentences = {"entailment": present, "neutral": present + motion, "contradiction": false}
        name = image(split, i).removesuffix(".jpg")
        rows += [{"image": name, "sentence": text.with_article(s), "label": label} for label, s in sentences.items()]
    write_json(folder / f"ve_{'dev' if split == 'val' else split}.json", rows)


def write_dialogues(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write dialogues in VisDial's format, and dense annotations outside training."""
    numbers = range(len(scenes))
    images, ids = [image(split, i) for i in numbers], [image_id(split, i) for i in numbers]
    content, dense = dialogues(scenes, images, ids, split, generator(seed, "dialogue", split))
    write_json(folder / f"visdial_1.0_{split}.json", content)
    if split != "train":
        write_json(folder / f"visdial_1.0_{split}_dense_annotations.json", dense)


def write_nocaps(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write the test images alternately to NoCaps's two splits; images with an unseen pair are "out-domain"."""
    rng = generator(seed, "nocaps")
    listed = [text.captions(scene, rng) for scene in scenes]
    for start, split in enumerate(("val", "test")):
        numbers = range(start, len(scenes), 2)
        ids = [image_id("test", i) for i in numbers]
        domains = ["out-domain" if unseen_pairs() & set(scenes[i].pairs) else "in-domain" for i in numbers]
        rows = [{"image": image("test", i), "img_id": image_id("test", i)} for i in numbers]
        write_json(folder / f"nocaps_{split}.json", rows)
        write_json(folder / f"nocaps_{split}_gt.json", ground_truth(ids, [listed[i] for i in numbers], domains))


def write_web(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write one text per web image (right, noisy, or of another image), and the kind of each text."""
    rng = generator(seed, "web")
    texts = [text.web_text(scene, rng.choice(scenes), rng) for scene in scenes]
    rows = [{"image": image("web", i), **found} for i, found in enumerate(texts)]
    for name, keys in (("pretrain_web", ("image", "caption")), ("pretrain_web_truth", ("image", "kind", "matches"))):
        write_json(folder / f"{name}.json", [{key: row[key] for key in keys} for row in rows])


def vocabulary() -> list[str]:
    """Return the vocabulary in BERT's format: special tokens, words, letters and digits."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text.words()]
