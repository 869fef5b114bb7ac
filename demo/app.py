"""A web page for captioning, questions, matching and image search: python -m demo.app

Without checkpoints it uses the project's small model, which knows a world of coloured shapes.
"""

import argparse
import random
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from demo.limits import BodyLimit, check_sizes, read_image, read_shown, read_text
from inference import load
from inference.explain import explain, sheet
from inference.inputs import find_images
from inference.neighbours import Collection
from inference.predictor import Predictor
from inference.search import Index, find_images_by_text
from miniature.scene import draw_scene, render
from utils import UserError, run_command, user_message

MINIATURE = Path(__file__).resolve().parent.parent / "configs" / "miniature"
SMALL = {
    "caption": MINIATURE / "model.safetensors",
    "vqa": MINIATURE / "vqa.safetensors",
    "match": MINIATURE / "model.safetensors",
}
MAX_FILES = 200  # images of one search
MAX_UPLOAD = "50mb"
KEPT_SECONDS = 3600  # before uploads and results are deleted
EXAMPLES = 6
STYLE = "td, th {padding: 2px 14px; text-align: left; border: none} th {font-weight: normal; opacity: 0.6}"


class Page:
    """The models of the page, by task, the small one without a checkpoint; they answer one request at a time.

    Without uploads a search reads the images of `folder`; '' for none.
    """

    def __init__(self, checkpoints: dict[str, str], device: str = "", folder: str = ""):
        self.sources = {task: checkpoints.get(task) or str(SMALL[task]) for task in SMALL}
        self.device, self.folder = device, folder
        self.models: dict[str, Predictor] = {}
        self.index = Index(None, "")
        self.lock = threading.Lock()

    def start(self) -> None:
        """Load the models; raises UserError for a checkpoint that does not fit its task, or a folder without image."""
        if self.folder:
            find_images([self.folder])
        self.models = {task: load(task, source, self.device) for task, source in self.sources.items()}

    def caption(self, path: str | None, sample: bool, number: float) -> tuple[str, Image.Image]:
        """Return a table of captions, and attention maps of the best."""
        image = read_image(path)
        with self.lock:
            model = self.models["caption"]
            settings = {"sample": bool(sample), "num_captions": int(number), "num_beams": max(int(number), 3)}
            captions = model.caption(image, **settings)[0]["captions"]
            best = captions[0]["caption"]
            maps = unique(sheet(image, best, explain(model, image, best)))
        rows = [(row["caption"], f"{row['log_prob']:.2f}") for row in captions]
        return table(("caption", "log-probability"), rows), maps

    def ask(self, path: str | None, question: str) -> tuple[str, Image.Image]:
        """Return an answer, and attention maps of the question's words."""
        image, question = read_image(path), read_text(question, "question")
        with self.lock:
            model = self.models["vqa"]
            best = model.answer(image, question)[0]["answers"][0]
            words = f"{question}  {best['answer']}"
            maps = unique(sheet(image, words, explain(model, image, question, best["answer"])))
        return table(("answer", "log-probability"), [(best["answer"], f"{best['log_prob']:.2f}")]), maps

    def match(self, path: str | None, text: str) -> tuple[str, Image.Image]:
        """Return how well a text describes an image, and attention maps of its words."""
        image, text = read_image(path), read_text(text, "text")
        with self.lock:
            model = self.models["match"]
            found = model.match(image, text)[0]["matches"][0]
            maps = unique(sheet(image, text, explain(model, image, text)))
        row = (f"{found['probability']:.1%}", f"{found['cosine']:.3f}")
        return table(("matching probability", "cosine"), [row]), maps

    def search(self, files: Sequence[str] | None, text: str) -> tuple[str, list[tuple[Image.Image, str]]]:
        """Return the images that fit a text best, among the uploaded ones or those in the page's folder."""
        text = read_text(text, "text")
        if files and len(files) > MAX_FILES:
            raise UserError(f"{len(files)} images are too many for this page; give at most {MAX_FILES}")
        with self.lock:
            model = self.models["match"]
            check_sizes(files or ())
            collection, errors = self.images(model, files)
            if not collection.names:
                raise UserError("there is no image to search; upload some")
            found = find_images_by_text(model, collection, [text], top=8)[0]["images"]
        gallery = [(unique(read_shown(Path(row["image"]))), f"{row['probability']:.1%}") for row in found]
        left_out = f", {len(errors)} could not be read" if errors else ""
        return f"searched {len(collection.names)} images{left_out}", gallery

    def images(self, model: Any, files: Sequence[str] | None) -> tuple[Collection, list[dict]]:
        """Return the uploaded images, or those of the page's folder, which is indexed once; and errors."""
        if files:
            index, paths = Index(None, ""), [Path(name) for name in files]
        else:
            index, paths = self.index, find_images([self.folder]) if self.folder else []
        errors = index.add(model, paths)
        return (index.part(paths) if paths else Index(None, "").part()), errors

    def about(self) -> str:
        """Return HTML that lists the models and the device."""
        small = {task for task, source in self.sources.items() if source == str(SMALL[task])}
        note = (
            "<p>Tasks without a checkpoint use the project's small model. It knows only a miniature world of coloured "
            "shapes, as in the examples. Start with <code>--caption</code>, <code>--vqa</code> and "
            "<code>--match</code> for your own photographs.</p>"
        )
        rows = [(t, Path(source).name, "small model" if t in small else "") for t, source in self.sources.items()]
        device = next(iter(self.models.values())).device.type
        return (note if small else "") + table(("task", "model", ""), rows) + f"<p>device: {escape(device)}</p>"


def unique(image: Image.Image) -> Image.Image:
    """Make the file of a resulting image unique, since Gradio rewrites a shared file while others may read it."""
    image.info["request"] = uuid.uuid4().hex
    return image


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of escaped texts."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>"


def shows_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the page shows its UserErrors."""
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
    """Build the page; raises UserError if Gradio is not installed."""
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
            _task(gradio, "Caption", shows_errors(page.caption), [sample, number], examples)
        with gradio.Tab("Ask"):
            question = _textbox(gradio, "Question", "what color is the circle?")
            _task(gradio, "Ask", shows_errors(page.ask), [question], examples)
        with gradio.Tab("Match"):
            text = _textbox(gradio, "Text", "a red circle above a blue square")
            _task(gradio, "Match", shows_errors(page.match), [text], examples)
        with gradio.Tab("Search"):
            _search(gradio, page)
    return blocks.queue(max_size=100)


def _textbox(gradio: Any, label: str, placeholder: str) -> Any:
    return gradio.Textbox(label=label, placeholder=placeholder, elem_id=label.lower(), render=False)


def uploaded(payload: Any) -> str | None:
    """Return the path of an uploaded image; any other file that a request names is refused."""
    from gradio import Error
    from gradio.utils import get_upload_folder

    if not payload:
        return None
    if not payload.path or not Path(payload.path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise Error("this image was not uploaded; upload it", print_exception=False, title="Not done")
    return payload.path


def _task(gradio: Any, name: str, function: Callable[..., Any], inputs: list[Any], examples: Sequence[str]) -> None:
    """Lay out a task: image and settings on the left, result and maps on the right."""
    key = name.lower()
    with gradio.Row():
        with gradio.Column():
            sources = ["upload", "clipboard"]
            image = gradio.Image(
                label="Image", type="filepath", sources=sources, height=300, image_mode=None, elem_id=f"{key}-image"
            )
            image.preprocess = uploaded  # our own messages for files that are no image
            for item in inputs:
                item.render()
            button = gradio.Button(name, variant="primary", elem_id=f"{key}-button")
            gradio.Examples([[path] for path in examples], image, label="Examples from the miniature world")
        with gradio.Column():
            result = gradio.HTML(elem_id=f"{key}-result")
            gradio.Markdown("Attention of the model, word by word")
            maps = gradio.Image(show_label=False, interactive=False, format="png", elem_id=f"{key}-maps")
    button.click(function, [image, *inputs], [result, maps], concurrency_id="model", api_name=key)


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
    button.click(shows_errors(page.search), [files, text], [note, gallery], concurrency_id="model", api_name="search")


def main() -> None:
    """Start the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for task, text in (("caption", "captions"), ("vqa", "answers"), ("match", "matching and search")):
        parser.add_argument(f"--{task}", default="", metavar="CHECKPOINT", help=f"weights for {text}: path, URL or hf:")
    parser.add_argument("--folder", default="", help="folder of images to search when none are uploaded")
    parser.add_argument("--device", default="", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    args = parser.parse_args()
    page = Page({task: getattr(args, task) for task in SMALL}, args.device, args.folder)
    page.start()
    with tempfile.TemporaryDirectory() as folder:
        blocks = build(page, example_images(Path(folder)))
        from starlette.middleware import Middleware  # comes with Gradio

        try:
            blocks.launch(
                server_name=args.host, server_port=args.port, max_file_size=MAX_UPLOAD, allowed_paths=[folder],
                css=STYLE, app_kwargs={"middleware": [Middleware(BodyLimit)]},
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{error}; choose another --port") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
