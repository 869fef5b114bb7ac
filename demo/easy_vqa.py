"""Convert the questions of the package easy-vqa: python -m demo.easy_vqa --output output/easy_vqa"""

import argparse
import sys
from pathlib import Path

import easy_vqa

from files import write_json
from utils import run_command


def convert(questions: tuple[list[str], list[str], list[int]], images: dict[int, str], root: Path, start: int) -> list:
    """Return questions in the released VQA format."""
    rows = enumerate(zip(*questions, strict=True), start)
    return [
        {"image": str(Path(images[i]).relative_to(root)), "question": q, "question_id": n, "answer": [a]}
        for n, (q, a, i) in rows
    ]


def main() -> None:
    """Write train.json, its questions about shapes, test.json and answers.json, and link the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/easy_vqa")
    folder, root = Path(parser.parse_args().output), Path(easy_vqa.__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train = convert(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), root, 0)
    test = convert(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), root, 1_000_000)
    what = [row for row in train if row["question"].startswith("what shape")]
    named = [row for row in train if any(s in row["question"] for s in ("circle", "rectangle", "triangle"))]
    files = {"train": train, "what_shape": what, "named_shape": named, "test": test, "answers": easy_vqa.get_answers()}
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    if not (folder / "images").exists():
        (folder / "images").symlink_to(root)
    print(f"wrote {len(train)} and {len(test)} questions to {folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))
