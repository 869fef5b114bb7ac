"""Video clips of the miniature world: objects move in front of a fixed background."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from files import write_json
from miniature.scene import Scene, draw_scene, render
from miniature.text import RELATIONS, a, questions
from utils import UserError, track

NUM_FRAMES = 16
FRAMES_PER_SECOND = 8
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def write_videos(folder: Path, annotations: Path, count: int, seed: int, image_size: int) -> None:
    """Write `count` clips with distinct captions in MSRVTT's format, and questions in MSRVTT-QA's; needs PyAV."""
    rng, lines = random.Random(f"{seed}/video"), []
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    scenes: dict[frozenset, Scene] = {}  # by their objects
    while len(scenes) < count:
        scene = draw_scene(rng, 3)
        if len(scene.items) > 1:
            scenes.setdefault(frozenset(scene.pairs), scene)
    for number, scene in enumerate(track(list(scenes.values()), "videos")):
        moves = [rng.choice(list(MOVES)) for _ in scene.items]
        times = np.linspace(0, 1, NUM_FRAMES)
        frames = [np.asarray(render(scene_at(scene, moves, time), image_size)) for time in times]
        encode(frames, folder / "videos" / f"video{number}.mp4")
        listed = [f"{a(item, False)} moving {move}" for item, move in zip(scene.items, moves, strict=True)]
        caption = ", ".join(listed[:-1]) + f" and {listed[-1]}"
        lines.append(json.dumps({"clip_name": f"video{number}", "caption": caption}))
    (annotations / "msrvtt_test.jsonl").write_text("\n".join(lines) + "\n")
    write_json(annotations / "msrvtt_qa_test.json", clip_questions(list(scenes.values()), seed))


def clip_questions(scenes: list[Scene], seed: int) -> list[dict[str, Any]]:
    """Return questions in MSRVTT-QA's format, four of each clip at most, none about places, which change."""
    rng, rows = random.Random(f"{seed}/video questions"), []
    for clip, scene in enumerate(scenes):
        asked = [one for one in questions(scene, rng, 20) if not any(word in one.text for word in RELATIONS)]
        for one in asked[:4]:
            rows.append({"id": len(rows), "video_id": clip, "question": one.text, "answer": one.answer})
    return rows


def scene_at(scene: Scene, moves: list[str], time: float) -> Scene:
    """Return the scene at a time from 0 to 1: each object moves by a fifth of the image, centred on its position."""
    items = []
    for item, move in zip(scene.items, moves, strict=True):
        half, distance = item.side / 2, 0.2 * (time - 0.5)
        x, y = (place + step * distance for place, step in zip((item.x, item.y), MOVES[move], strict=True))
        items.append(replace(item, x=min(max(x, half), 1 - half), y=min(max(y, half), 1 - half)))
    return replace(scene, items=tuple(items))


def encode(frames: list[np.ndarray], path: Path) -> None:
    """Write frames (H, W, 3) uint8 as MP4."""
    try:
        import av
    except ImportError:
        raise UserError("writing videos needs PyAV; pip install av") from None
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
