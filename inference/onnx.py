"""Caption images and answer questions over ONNX graphs: needs onnxruntime, tokenizers, NumPy and Pillow, no PyTorch.

    python convert.py --to-onnx captioner.pth --part caption --output captioner/
    python -m inference.onnx captioner/ a.jpg b.jpg

Mistakes raise ValueError, since `utils.UserError` imports PyTorch.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.beams import Beams, Text

# The released tokenizer joins these with what stands before them.
JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class OnnxModel:
    """A captioner or VQA model that `inference.onnx_export` wrote.

    Args:
        folder: of the graphs.
        num_threads: of onnxruntime; 0 for one a core.
        providers: of onnxruntime, such as "CUDAExecutionProvider"; by default the CPU.

    Raises:
        ValueError: the folder holds no such model.
    """

    def __init__(self, folder: str | Path, num_threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        import onnxruntime
        from tokenizers import Tokenizer

        folder = Path(folder)
        if not (folder / "settings.json").is_file() or not (folder / "decoder.onnx").is_file():
            raise ValueError(f"{folder} holds no captioner or VQA model; give a folder that convert.py --to-onnx wrote")
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = num_threads, 3
        self.graphs = {
            path.stem: onnxruntime.InferenceSession(str(path), options, list(providers))
            for path in folder.glob("*.onnx")
        }

    def caption(self, images: Sequence[Any], batch_size: int = 16, **search: int) -> list[str]:
        """Caption images, paths or PIL images; `search` may set num_beams, max_length and min_length, as predict.py."""
        self._check("caption")
        found: list[str] = []
        for part in (images[i : i + batch_size] for i in range(0, len(images), batch_size)):
            keys = self._run("image", image=self.pixels(part))[0]
            found += [self.decode(text.tokens)[len(self.settings["prompt"]) :] for text in self.search(keys, **search)]
        return found

    def answer(self, images: Sequence[Any], question: str, batch_size: int = 16, **search: int) -> list[str]:
        """Answer a question about images; arguments as `caption`."""
        self._check("vqa")
        ids, found = self.question_ids(question), []
        for part in (images[i : i + batch_size] for i in range(0, len(images), batch_size)):
            keys = self._run("image", image=self.pixels(part))[0]
            keys = self._run("question", input_ids=np.tile(ids, (len(part), 1)), keys=keys)[0]
            found += [self.decode(text.tokens) for text in self.search(keys, **search)]
        return found

    def _check(self, task: str) -> None:
        if self.settings["task"] != task:
            raise ValueError(f"this is a model for {self.settings['task']}; convert a checkpoint with --part {task}")

    def _run(self, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.graphs[name].run(None, inputs)

    # Images and texts.

    def pixels(self, images: Sequence[Any]) -> np.ndarray:
        """Return images as float32 (images, 3, side, side).

        Raises:
            ValueError: one cannot be read, or has more than 8 bits a channel.
        """
        side, rows = self.settings["image_size"], []
        mean, std = (np.array(self.settings[name], np.float32)[:, None, None] for name in ("mean", "std"))
        for image in images:
            try:
                opened = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
                if opened.mode[0] in "IF":
                    raise ValueError(f"its mode is {opened.mode}, not 8 bits a channel")
                resized = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"image {image} cannot be read ({error}); replace it or take it out") from None
            rows.append((np.asarray(resized, np.float32).transpose(2, 0, 1) / 255 - mean) / std)
        return np.stack(rows)

    def question_ids(self, question: str) -> np.ndarray:
        """Return the tokens of a question, cleaned as in training, int64 (length,)."""
        text = question.lower().translate(str.maketrans("", "", self.settings["deleted"])).rstrip(" ")
        text = " ".join(text.split(" ")[: self.settings["max_words"]])
        if not text:
            raise ValueError("the question is empty; ask one, such as 'what color is the dog?'")
        ids = self.tokenizer.encode(text).ids
        most = self.settings["max_question_tokens"]
        ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
        return np.array([self.settings["enc_id"], *ids[1:]])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        words = [self.tokenizer.id_to_token(i) for i in ids if i not in self.settings["special_ids"]]
        text = " ".join(words).replace(" ##", "")
        for joined in JOINED:
            text = text.replace(joined, joined.strip(" "))
        return text

    # Search.

    def search(
        self, keys: np.ndarray, num_beams: int | None = None, max_length: int | None = None,
        min_length: int | None = None,
    ) -> list[Text]:  # fmt: skip
        """Return the best text for each of the sources that keys belong to, by beam search; greedy with one beam.

        Args:
            keys: (layers, 2, sources, heads, length, head width).
            num_beams, max_length, min_length: as in `models.generation.GenerationConfig`; None as exported.

        Raises:
            ValueError: the prompt fills max_length.
        """
        asked = {"num_beams": num_beams, "max_length": max_length, "min_length": min_length}
        config = self.settings["generation"] | {name: value for name, value in asked.items() if value is not None}
        beams, prompt = config["num_beams"], self.settings["prompt_ids"]
        if config["max_length"] <= len(prompt) or beams < 1:
            raise ValueError(f"num_beams is {beams} and max_length {config['max_length']}; raise the lower")
        texts = [Text(prompt, 0.0 if beam == 0 else -1e9) for beam in range(beams)]
        kind = Greedy if beams == 1 else Beams
        searches = [kind(texts, 1.0) for _ in range(keys.shape[2])]
        running, last = searches, np.tile(prompt, (keys.shape[2], 1, 1))
        cache = np.zeros((*keys.shape[:3], 1, keys.shape[3], 0, keys.shape[5]), np.float32)
        read, axis = self._read_by_decoder(keys)
        for length in range(len(prompt) + 1, config["max_length"] + 1):
            logits, cache = self._run("decoder", input_ids=last, cache=cache, **read)
            if length == len(prompt) + 1:
                logits, cache = np.repeat(logits, beams, axis=1), np.repeat(cache, beams, axis=3)
            origins = [
                search.advance(list(best), logits.shape[2], self.settings["end_id"])
                for search, best in zip(running, self._candidates(logits, running, config["min_length"]), strict=True)
            ]
            left = [i for i, search in enumerate(running) if not search.done]
            if not left:
                break
            if len(left) < len(running):
                read = {name: np.take(part, left, axis) for name, part in read.items()}
            running = [running[i] for i in left]
            cache = np.take_along_axis(cache[:, :, left], as_index([origins[i] for i in left]), axis=3)
            last = np.array([[text.tokens[-1:] for text in search.texts] for search in running])
        return [search.best(1)[0] for search in searches]

    def _read_by_decoder(self, keys: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Return keys as the decoder takes them, in older folders in one tensor, and the dimension of the sources."""
        if any(found.name == "keys" for found in self.graphs["decoder"].get_inputs()):
            return {"keys": keys}, 2
        parts = keys.reshape(-1, *keys.shape[2:])
        return {f"keys_{i}": part for i, part in enumerate(parts)}, 0

    def _candidates(self, logits: np.ndarray, running: Sequence[Beams], min_length: int) -> Iterator[np.ndarray]:
        """Yield for each source the 2 * beams best continuations, as `Beams.advance` takes them."""
        for rows, search in zip(log_softmax(logits), running, strict=True):
            scores = rows + np.array([[text.score] for text in search.texts], np.float32)
            if len(search.texts[0].tokens) < min_length:
                scores[:, self.settings["end_id"]] = -np.inf
            flat, count = scores.ravel(), 2 * len(search.texts)
            best = np.argpartition(flat, -count)[-count:]
            best = best[np.argsort(-flat[best], kind="stable")]
            yield np.stack((flat[best].astype(float), best, rows.ravel()[best]), axis=1).tolist()


class Greedy(Beams):
    """One text, extended by the most probable token until that is the end."""

    def advance(self, candidates: list[list[float]], vocab_size: int, eos_token_id: int) -> list[int]:
        """As `Beams.advance`."""
        (score, token, log_prob), text = candidates[0], self.texts[0]
        self.done = token == eos_token_id
        tokens = text.tokens if self.done else [*text.tokens, int(token)]
        self.texts = [Text(tokens, score, text.log_prob + log_prob)]
        return [0]

    def best(self, number: int) -> list[Text]:
        """As `Beams.best`."""
        return self.texts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of logits (..., vocabulary)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def as_index(origins: list[list[int]]) -> np.ndarray:
    """Return the beams that continue (sources, beams) as an index into a cache, for `np.take_along_axis`."""
    return np.array(origins)[None, None, :, :, None, None, None]


def main() -> int:
    """Print a JSON line for each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that convert.py --to-onnx wrote")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--question", default="", help="of a VQA model")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once (default: 16)")
    parser.add_argument("--num_threads", type=int, default=0, help="of onnxruntime (default: one a core)")
    args = parser.parse_args()
    try:
        model = OnnxModel(args.folder, args.num_threads)
        if args.question:
            found = model.answer(args.images, args.question, args.batch_size)
        else:
            found = model.caption(args.images, args.batch_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    key = "answer" if args.question else "caption"
    for image, text in zip(args.images, found, strict=True):
        print(json.dumps({"image": image, key: text}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
