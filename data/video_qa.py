"""Questions about video clips, in the formats of MSRVTT-QA and MSVD-QA (Xu et al., ACM Multimedia 2017)."""

from pathlib import Path
from typing import Any

from data.annotations import Row, entry_error, read_annotation, read_text
from data.ids import check_question_ids
from data.text import pre_question
from data.video import Clips
from data.vqa import read_answers
from utils import UserError, short_repr


class VideoQuestions(Clips):
    """Clips with questions; items as `Clips`.

    Args:
        annotation_file: JSON list, or JSON lines, of {"video_id" (a number, or a name) or "video" (a file), "question",
            "id" or "question_id", "answer" (may be absent)}.
        video_root, num_frames, image_size, upright: as `Clips`. Clip n is video<n> with any ending.
        video_map: file with the lines "<name> vid<n>", after which clip n is <name> with any ending; '' for none.
        answer_file: candidate answers; '' for none.

    Attributes:
        annotation: {"question_id", "question", "image" (the clip's file), "clip" (its number), "answer" where known}.
        answer_list: candidate answers.
    """

    def __init__(
        self, annotation_file: str, video_root: str, num_frames: int, image_size: int, upright: bool = False,
        video_map: str = "", answer_file: str = "",
    ):  # fmt: skip
        rows = read_annotation(annotation_file, ("question",))
        names = read_video_map(video_map) if video_map else {}
        files = {path.stem: path.name for path in sorted(Path(video_root).glob("*.*"))}
        numbers: dict[str, int] = {}
        self.annotation: list[Row] = []
        for number, row in enumerate(rows):
            try:
                clip = clip_name(row, names)
            except ValueError as error:
                raise entry_error(str(error), annotation_file, number) from None
            file = files.get(Path(clip).stem, clip if Path(clip).suffix else f"{clip}.mp4")
            question_id = row.get("question_id", row.get("id", number))
            asked = {"question_id": question_id, "image": file, "clip": numbers.setdefault(file, len(numbers))}
            answer = {"answer": row["answer"]} if "answer" in row else {}
            self.annotation.append(asked | {"question": pre_question(row["question"])} | answer)
        check_question_ids(self.annotation, annotation_file)
        self.answer_list = read_answers(answer_file) if answer_file else []
        super().__init__(list(numbers), video_root, num_frames, image_size, upright, annotation_file)
        self.questions: list[list[Row]] = [[] for _ in numbers]  # of each clip
        for row in self.annotation:
            self.questions[row["clip"]].append(row)


def clip_name(row: Row, names: dict[str, str]) -> str:
    """Return the name or the file of a row's clip; ValueError, which says so, if there is none or the map lacks it."""
    value: Any = row.get("video", row.get("video_id"))
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"'video_id' is {short_repr(value)}; expected the number or the name of a clip")
    if names and f"vid{value}" not in names:
        raise ValueError(f"'video_id' is {short_repr(value)}, and video_map has no vid{value}; correct video_map")
    return names[f"vid{value}"] if names else f"video{value}" if isinstance(value, int) else value


def read_video_map(path: str) -> dict[str, str]:
    """Read the names of clips from lines "<name> vid<n>", as MSVD-QA's youtube_mapping.txt has them."""
    lines = [line.split() for line in read_text(Path(path)).splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) != 2:
            raise UserError(f"video_map {path}, line {number}: {len(line)} words; expected '<name> vid<number>'")
    return {key: name for name, key in lines}
