"""Write a small world to a folder: images of coloured shapes, and annotations in every released file format.

    python -m miniature.world --output output/miniature --level 4 --seed 0

Some pairs of colour and shape (`miniature.scene.unseen_pairs`) occur in test images only.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miniature import text
from miniature.scene import LEVELS, Scene, draw_scene, render, seen_pairs, unseen_pairs
from utils import UserError, track

UNSEEN_SHARE = 0.12  # of test images
TRIES = 1000  # draws in a row that bring nothing new before giving up
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

    Args:
        folder: made if absent.
        level: 1 one object on plain ground; 2 one or two; 3 up to three; 4 the same on textured grounds.
        seed: of everything.
        num_train, num_val, num_test, num_web: images of each split.
        num_videos: short MP4 clips.
        image_size: side of the images in pixels.

    Raises:
        UserError: a level that is none, or more test images than the level has different scenes.
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
    write(folder / "scenes.json", {image(s, i): asdict(x) for s, xs in splits.items() for i, x in enumerate(xs)})
    annotations = folder / "annotations"
    for split in ("train", "val", "test"):
        write_captions(annotations, split, splits[split], seed)
        write_questions(annotations, split, splits[split], seed)
        write_statements(annotations, split, splits[split], seed)
    write(annotations / "answer_list.json", text.answer_list())
    write_nocaps(annotations, splits["test"], seed)
    write_web(annotations, splits, seed)
    if num_videos:
        from miniature.video import write_videos

        write_videos(folder, annotations, num_videos, seed, image_size)
    return folder


def image(split: str, index: int) -> str:
    """Return a image's path from the folder; the number that ends it is its id."""
    return f"images/{split}/{image_id(split, index):07d}.jpg"


def image_id(split: str, index: int) -> int:
    """Return a image's id, unique in the world."""
    return FIRST_ID[split] + index


def generator(*names: Any) -> random.Random:
    """Return random numbers that depend on the given names only."""
    return random.Random("/".join(map(str, names)))


def make_scenes(split: str, count: int, level: int, seed: int) -> list[Scene]:
    """Draw a split's scenes; in the test split no two show the same objects."""
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
    """Return what a full caption tells of a scene; an only object also by its size and place."""
    if len(scene.items) == 1:
        item = scene.items[0]
        return item.pair, item.size, text.position(item)
    return frozenset(scene.pairs)


def write(path: Path, content: Any) -> None:
    """Write JSON, one entry a line where it is a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = ",\n".join(json.dumps(entry) for entry in content)
        path.write_text(f"[\n{lines}\n]\n")
    else:
        path.write_text(json.dumps(content))


def write_captions(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write captions for captioning, and fuller ones for retrieval, as COCO's and Flickr30k's."""
    for prefix, sized in (("coco_karpathy", False), ("flickr30k", True)):
        rng = generator(seed, prefix, split)
        listed = [text.captions(scene, rng, sized) for scene in scenes]
        if split == "train":
            rows = [
                {"image": image(split, i), "caption": caption, "image_id": f"{prefix}_{image_id(split, i)}"}
                for i, captions in enumerate(listed)
                for caption in captions
            ]
            write(folder / f"{prefix}_{split}.json", rows)
        else:
            rows = [{"image": image(split, i), "caption": captions} for i, captions in enumerate(listed)]
            write(folder / f"{prefix}_{split}.json", rows)
            if not sized:
                ids = [image_id(split, i) for i in range(len(scenes))]
                write(folder / f"{prefix}_{split}_gt.json", ground_truth(ids, listed))
        if split == "train" and not sized:
            human = [{"image": row["image"], "caption": row["caption"]} for row in rows]
            write(folder / "pretrain_human.json", human)


def ground_truth(ids: Sequence[int], captions: Sequence[Sequence[str]], domains: Sequence[str] = ()) -> dict[str, Any]:
    """Return captions in COCO's format."""
    images = [{"id": i, **({"domain": domains[n]} if domains else {})} for n, i in enumerate(ids)]
    rows = [(i, caption) for i, listed in zip(ids, captions, strict=True) for caption in listed]
    return {"images": images, "annotations": [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(rows)]}


def write_questions(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write questions with ten answers each; every eighth training image's as Visual Genome's, with one answer."""
    rng = generator(seed, "vqa", split)
    rows: dict[str, list[dict[str, Any]]] = {f"vqa_{split}": []}
    if split == "train":
        rows["vg_qa"] = []
    for i, scene in enumerate(scenes):
        for number, question in enumerate(text.questions(scene, rng, 4)):
            genome = split == "train" and i % 8 == 0
            row = {
                "dataset": "vg" if genome else "vqa",
                "image": image(split, i),
                "question": question.text,
                "question_id": image_id(split, i) * 10 + number,
                "answer": question.answer if genome else text.ten_answers(question, rng),
                "answer_type": question.kind,
            }
            rows["vg_qa" if genome else f"vqa_{split}"].append(row)
    for name, content in rows.items():
        write(folder / f"{name}.json", content)


def write_statements(folder: Path, split: str, scenes: Sequence[Scene], seed: int) -> None:
    """Write statements about two images, each judged for two true and two false pairs.

    Outside training every statement occurs once: consistency takes all pairs of one sentence together.
    """
    rng = generator(seed, "nlvr", split)
    pairs = seen_pairs() + (sorted(unseen_pairs()) if split == "test" else [])
    rows: list[dict[str, Any]] = []
    used: set[str] = set()
    misses = 0
    while len(rows) < 2 * len(scenes) and misses < TRIES:
        made = text.statement(rng, pairs)
        judged = [] if made.text in used else text.judged_pairs(made, scenes, rng)
        misses = 0 if judged else misses + 1
        if judged and split != "train":
            used.add(made.text)
        for left, right, truth in judged:
            images = [image(split, left), image(split, right)]
            rows.append({"images": images, "sentence": made.text, "label": str(truth)})
    write(folder / f"nlvr_{'dev' if split == 'val' else split}.json", rows)


def write_nocaps(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Write the test images, by turns, as NoCaps's two splits; those with an unseen pair are "out-domain"."""
    rng = generator(seed, "nocaps")
    listed = [text.captions(scene, rng) for scene in scenes]
    for start, split in enumerate(("val", "test")):
        numbers = range(start, len(scenes), 2)
        ids = [image_id("test", i) for i in numbers]
        domains = ["out-domain" if unseen_pairs() & set(scenes[i].pairs) else "in-domain" for i in numbers]
        rows = [{"image": image("test", i), "img_id": image_id("test", i)} for i in numbers]
        write(folder / f"nocaps_{split}.json", rows)
        write(folder / f"nocaps_{split}_gt.json", ground_truth(ids, [listed[i] for i in numbers], domains))


def write_web(folder: Path, splits: dict[str, list[Scene]], seed: int) -> None:
    """Write one text for every web image: right, noisy, or of another image; and which is which."""
    rng, scenes = generator(seed, "web"), splits["web"]
    texts = [text.web_text(scene, rng.choice(scenes), rng) for scene in scenes]
    rows = [{"image": image("web", i), "caption": found["caption"]} for i, found in enumerate(texts)]
    truth = [{"image": image("web", i), "kind": x["kind"], "matches": x["matches"]} for i, x in enumerate(texts)]
    write(folder / "pretrain_web.json", rows)
    write(folder / "pretrain_web_truth.json", truth)


def vocabulary() -> list[str]:
    """Return this world's vocabulary in BERT's format: special tokens, words, letters and digits."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text.words()]


def main() -> int:
    """Read the command line and write the world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/miniature", help="folder to write (default: output/miniature)")
    parser.add_argument("--level", type=int, default=4, help="difficulty, 1 to 4 (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    defaults = {"train": 6000, "val": 300, "test": 500, "web": 6000}
    for split, count in defaults.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} images (default: {count})")
    parser.add_argument("--videos", type=int, default=0, help="video clips (default: 0)")
    parser.add_argument("--image_size", type=int, default=64, help="side of the images in pixels (default: 64)")
    args = parser.parse_args()
    try:
        folder = write_miniature(
            args.output, args.level, args.seed, args.train, args.val, args.test, args.web, args.videos, args.image_size
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote the miniature world, level {args.level}, to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
