"""A web page to caption, question, match and search images: python -m demo.app

Without checkpoints it shows the small model that comes with the project, which knows a world of coloured shapes.
"""

import argparse
import random
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from data.transforms import BAD_IMAGE, open_image
from demo.limits import BodyLimit
from inference import load
from inference.explain import explain, sheet
from inference.inputs import find_images
from inference.predictor import Predictor
from inference.search import Index, find_images_by_text
from miniature.scene import draw_scene, render
from utils import UserError, user_message

MINIATURE = Path(__file__).resolve().parent.parent / "configs" / "miniature"
SHIPPED = {"caption": MINIATURE / "model.safetensors", "vqa": MINIATURE / "vqa.safetensors",
           "match": MINIATURE / "model.safetensors"}  # fmt: skip
MAX_MEGAPIXELS = 100
MAX_MEGAPIXELS_OF_ALL = 2500  # images of one search: about a minute of decoding
SHOWN_SIDE = 1024  # pixels
MAX_TEXT = 300  # characters
MAX_FILES = 200  # images of one search
MAX_UPLOAD = "50mb"
KEPT_SECONDS = 3600  # that uploads and results stay on the disk
EXAMPLES = 6
STYLE = "td, th {padding: 2px 14px; text-align: left; border: none} th {font-weight: normal; opacity: 0.6}"


class Page:
    """The models behind the page; they answer one request at a time.

    Args:
        checkpoints: task -> checkpoint; '' for the shipped miniature model.
        device: "cuda", "cpu", or '' for a GPU where there is one.
        folder: images that can be searched without uploading any; '' for none.
    """

    def __init__(self, checkpoints: dict[str, str], device: str = "", folder: str = ""):
        self.sources = {task: checkpoints.get(task) or str(SHIPPED[task]) for task in SHIPPED}
        self.device, self.folder = device, folder
        self.models: dict[str, Predictor] = {}
        self.index = Index(None, "")
        self.lock = threading.Lock()

    def start(self) -> None:
        """Load the models and look at the folder, so that mistakes show before the page does.

        Raises:
            UserError: a checkpoint does not fit its task, or the folder holds no image.
        """
        if self.folder:
            find_images([self.folder])
        self.models = {task: load(task, source, self.device) for task, source in self.sources.items()}

    def caption(self, path: str | None, sample: bool, number: float) -> tuple[str, Image.Image]:
        """Return captions with their log-probabilities, and maps of the best."""
        image = read_image(path)
        with self.lock:
            model = self.models["caption"]
            settings = {"sample": bool(sample), "num_captions": int(number), "num_beams": max(int(number), 3)}
            captions = model.caption(image, **settings)[0]["captions"]
            best = captions[0]["caption"]
            maps = own(sheet(image, best, explain(model, image, best)))
        return table(
            ("caption", "log-probability"), [(row["caption"], f"{row['log_prob']:.2f}") for row in captions]
        ), maps

    def ask(self, path: str | None, question: str) -> tuple[str, Image.Image]:
        """Return an answer, and maps of the question's words."""
        image, question = read_image(path), read_text(question, "question")
        with self.lock:
            model = self.models["vqa"]
            found = model.answer(image, question)[0]["answers"][0]
            words = f"{question}  {found['answer']}"
            maps = own(sheet(image, words, explain(model, image, question, found["answer"])))
        return table(("answer", "log-probability"), [(found["answer"], f"{found['log_prob']:.2f}")]), maps

    def match(self, path: str | None, text: str) -> tuple[str, Image.Image]:
        """Return how well a text describes a image, and maps of its words."""
        image, text = read_image(path), read_text(text, "text")
        with self.lock:
            model = self.models["match"]
            found = model.match(image, text)[0]["matches"][0]
            maps = own(sheet(image, text, explain(model, image, text)))
        return table(
            ("matching probability", "cosine"), [(f"{found['probability']:.1%}", f"{found['cosine']:.3f}")]
        ), maps

    def search(self, files: Sequence[str] | None, text: str) -> tuple[str, list[tuple[Image.Image, str]]]:
        """Return the images that a text describes best, of those uploaded or of the page's folder."""
        text = read_text(text, "text")
        if files and len(files) > MAX_FILES:
            raise UserError(f"{len(files)} images are too many for this page; give at most {MAX_FILES}")
        with self.lock:
            model = self.models["match"]
            check_sizes(files or ())
            collection, errors = self.images(model, files)
            if not collection[0]:
                raise UserError("there is no image to search; upload some")
            found = find_images_by_text(model, collection, [text], top=8)[0]["images"]
        gallery = [(own(shown(Path(row["image"]))), f"{row['probability']:.1%}") for row in found]
        left_out = f", {len(errors)} could not be read" if errors else ""
        return f"searched {len(collection[0])} images{left_out}", gallery

    def images(self, model: Any, files: Sequence[str] | None) -> tuple[tuple[list[str], Any], list[dict]]:
        """Return names and features of uploaded images, or of those in the page's folder, which are indexed once."""
        if files:
            index, paths = Index(None, ""), [Path(name) for name in files]
        else:
            index, paths = self.index, find_images([self.folder]) if self.folder else []
        errors = index.add(model, paths)
        return (index.part(paths) if paths else ([], None)), errors

    def about(self) -> str:
        """Say in HTML which models answer, and on which device."""
        rows = [(task, source, "shipped with the project" if source == str(SHIPPED[task]) else "") for task, source in
                self.sources.items()]  # fmt: skip
        small = any(row[2] for row in rows)
        note = (
            "<p>Where no checkpoint was given, the small model answers that comes with the project. It "
            "knows only a miniature world of coloured shapes, as in the examples. Start with <code>--caption</code>, "
            "<code>--vqa</code> and <code>--match</code> for your own photographs.</p>"
        )
        device = next(iter(self.models.values())).device.type
        return (
            (note if small else "")
            + table(("task", "model", ""), [(t, Path(s).name, n) for t, s, n in rows])
            + (f"<p>device: {escape(device)}</p>")
        )


def read_image(path: str | None) -> Image.Image:
    """Read an uploaded image, a large one reduced.

    Raises:
        UserError: there is none, it is no image, or it is larger than the page takes.
    """
    if not path:
        raise UserError("there is no image yet; upload one, or click an example")
    _refuse_large(megapixels(path))
    return shown(Path(path))


def megapixels(path: str) -> float:
    """Return a image's size, without decoding it.

    Raises:
        UserError: it is no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return image.width * image.height / 1e6
    except BAD_IMAGE:
        raise UserError("this file is no image that can be read; upload a JPEG or PNG") from None


def _refuse_large(found: float) -> None:
    if found > MAX_MEGAPIXELS:
        raise UserError(f"the image has {found:.0f} megapixels; upload one of at most {MAX_MEGAPIXELS}")


def check_sizes(files: Sequence[str]) -> None:
    """Refuse uploads that would keep the page busy for long.

    Raises:
        UserError: one of the images, or all together, are larger than the page takes.
    """
    total = 0.0
    for name in files:
        try:
            found = megapixels(name)
        except UserError:  # the search counts what cannot be read
            continue
        _refuse_large(found)
        total += found
    if total > MAX_MEGAPIXELS_OF_ALL:
        raise UserError(f"{total:.0f} megapixels are too many for this page; give at most {MAX_MEGAPIXELS_OF_ALL}")


def shown(path: Path) -> Image.Image:
    """Read a image, a large one reduced."""
    image = open_image(path, upright=True, smallest=SHOWN_SIDE)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def own(image: Image.Image) -> Image.Image:
    """Mark a resulting image as one request's own.

    Gradio keeps equal images in one file, and writes it anew while another request may be reading it.
    """
    image.info["request"] = uuid.uuid4().hex
    return image


def read_text(text: str | None, name: str) -> str:
    """Return a text that was typed.

    Raises:
        UserError: it is empty or too long.
    """
    text = (text or "").strip()
    if not text:
        raise UserError(f"the {name} is empty; type one")
    if len(text) > MAX_TEXT:
        raise UserError(f"the {name} has {len(text)} characters; shorten it to {MAX_TEXT}")
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write an HTML table; its texts are escaped."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>"


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function's UserErrors be shown on the page."""
    import gradio

    def run(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except UserError as error:
            raise gradio.Error(escape(user_message(error) or ""), print_exception=False, title="Not done") from None

    return run


def example_images(folder: Path) -> list[str]:
    """Draw images of the miniature world."""
    rng, paths = random.Random(7), []
    for number in range(EXAMPLES):
        path = folder / f"example_{number + 1}.png"
        render(draw_scene(rng, 4), 256).save(path)
        paths.append(str(path))
    return paths


def build(page: Page, examples: Sequence[str]) -> Any:
    """Build the page.

    Raises:
        UserError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("the web page needs Gradio; pip install gradio") from None
    with gradio.Blocks(title="BLIP", delete_cache=(600, KEPT_SECONDS)) as blocks:
        gradio.Markdown("# BLIP")
        gradio.HTML(page.about())
        with gradio.Tab("Caption"):
            sample = gradio.Checkbox(label="Sample instead of searching", elem_id="sample", render=False)
            number = gradio.Slider(1, 5, value=1, step=1, label="Captions", render=False)
            _task(gradio, "Caption", told(page.caption), [sample, number], examples)
        with gradio.Tab("Ask"):
            question = _textbox(gradio, "Question", "what color is the circle?")
            _task(gradio, "Ask", told(page.ask), [question], examples)
        with gradio.Tab("Match"):
            text = _textbox(gradio, "Text", "a red circle above a blue square")
            _task(gradio, "Match", told(page.match), [text], examples)
        with gradio.Tab("Search"):
            _search(gradio, page)
    return blocks.queue(max_size=100)


def body_limit() -> Any:
    """Return what bounds requests, in the form in which Gradio takes it."""
    from starlette.middleware import Middleware

    return Middleware(BodyLimit)


def _textbox(gradio: Any, label: str, placeholder: str) -> Any:
    return gradio.Textbox(label=label, placeholder=placeholder, elem_id=label.lower(), render=False)


def uploaded(payload: Any) -> str | None:
    """Return the path of an uploaded image; a request may name any file of this machine, and gets none of them."""
    from gradio import Error
    from gradio.utils import get_upload_folder

    if not payload:
        return None
    if not payload.path or not Path(payload.path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise Error("this image was not uploaded; upload it", print_exception=False, title="Not done")
    return payload.path


def _task(gradio: Any, name: str, function: Callable[..., Any], inputs: list[Any], examples: Sequence[str]) -> None:
    """Lay out a task: image and settings left, result and maps right."""
    with gradio.Row():
        with gradio.Column():
            image = gradio.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=300,
                                   image_mode=None, elem_id=f"{name.lower()}-image")  # fmt: skip
            image.preprocess = uploaded  # what is no image is told by us
            for item in inputs:
                item.render()
            button = gradio.Button(name, variant="primary", elem_id=f"{name.lower()}-button")
            gradio.Examples([[path] for path in examples], image, label="Examples from the miniature world")
        with gradio.Column():
            result = gradio.HTML(elem_id=f"{name.lower()}-result")
            gradio.Markdown("What the model looks at, word by word")
            maps = gradio.Image(show_label=False, interactive=False, format="png", elem_id=f"{name.lower()}-maps")
    button.click(function, [image, *inputs], [result, maps], concurrency_id="model", api_name=name.lower())


def _search(gradio: Any, page: Page) -> None:
    """Lay out the search."""
    with gradio.Row():
        with gradio.Column():
            files = gradio.File(label="Images", file_count="multiple", elem_id="files")
            if page.folder:
                gradio.HTML(f"<p>Without uploads, the images of {escape(page.folder)} are searched.</p>")
            text = gradio.Textbox(label="Text", placeholder="a red circle", elem_id="query")
            button = gradio.Button("Search", variant="primary", elem_id="search-button")
        with gradio.Column():
            note = gradio.HTML(elem_id="search-result")
            gallery = gradio.Gallery(
                label="Found, with the probability of a match", columns=4, format="png", elem_id="search-found"
            )
    button.click(told(page.search), [files, text], [note, gallery], concurrency_id="model", api_name="search")


def main() -> int:
    """Start the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for task, text in (("caption", "captions"), ("vqa", "answers"), ("match", "matching and search")):
        parser.add_argument(f"--{task}", default="", metavar="CHECKPOINT", help=f"weights for {text}: path, URL or hf:")
    parser.add_argument("--folder", default="", help="images that can be searched without uploading any")
    parser.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    args = parser.parse_args()
    try:
        page = Page({task: getattr(args, task) for task in SHIPPED}, args.device, args.folder)
        with tempfile.TemporaryDirectory() as folder:
            page.start()
            examples = example_images(Path(folder))
            build(page, examples).launch(
                server_name=args.host, server_port=args.port, max_file_size=MAX_UPLOAD, allowed_paths=[folder],
                css=STYLE, app_kwargs={"middleware": [body_limit()]},
            )  # fmt: skip
        return 0
    except UserError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; choose another --port", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
