"""Limits of the web page: bytes of a request, megapixels of images, characters of texts."""

import warnings
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from PIL import Image

from data.transforms import BAD_IMAGE, open_image
from utils import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
MAX_MEGAPIXELS = 100
MAX_TOTAL_MEGAPIXELS = 2500  # images of one search: about a minute of decoding
SHOWN_SIDE = 1024  # pixels
MAX_TEXT = 300  # characters
UPLOAD_BYTES = 200 << 20  # of all files of a request
OTHER_BYTES = 1 << 20  # of everything else in a request, which is kept in memory
CLOSE = (b"connection", b"close")


class TooLarge(UserError):
    """An image has too many pixels."""


def read_image(path: str | None) -> Image.Image:
    """Read an uploaded image at the size that is shown; raises UserError if it is absent, unreadable or too large."""
    if not path:
        raise UserError("there is no image yet; upload one, or click an example")
    megapixels(path)
    return read_shown(Path(path))


def megapixels(path: str | IO[bytes]) -> float:
    """Return the megapixels of an image, without decoding it; raises UserError if it is no image or too large."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            found = image.width * image.height / 1e6
    except BAD_IMAGE:
        raise UserError("this file is no image that can be read; upload a JPEG or PNG") from None
    if found > MAX_MEGAPIXELS:
        raise TooLarge(f"the image has {found:.0f} megapixels; upload one of at most {MAX_MEGAPIXELS}")
    return found


def check_sizes(files: Sequence[str]) -> None:
    """Raise a UserError for uploads that would take too long: one image, or all together, are too large."""
    total = 0.0
    for name in files:
        try:
            total += megapixels(name)
        except TooLarge:
            raise
        except UserError:  # the search counts unreadable files
            continue
    if total > MAX_TOTAL_MEGAPIXELS:
        raise UserError(f"{total:.0f} megapixels are too many for this page; give at most {MAX_TOTAL_MEGAPIXELS}")


def read_shown(path: Path) -> Image.Image:
    """Read an image, reduced to the size that is shown."""
    image = open_image(path, upright=True, smallest=SHOWN_SIDE)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def read_text(text: str | None, name: str) -> str:
    """Return a typed text without outer blanks; raises UserError if it is empty or too long."""
    text = (text or "").strip()
    if not text:
        raise UserError(f"the {name} is empty; type one")
    if len(text) > MAX_TEXT:
        raise UserError(f"the {name} has {len(text)} characters; shorten it to {MAX_TEXT}")
    return text


class BodyLimit:
    """ASGI middleware that answers 413 to a request with too large a body: announced, or received so far.

    Gradio itself limits each file, and neither their sum nor the fields and JSON that it keeps in memory.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(reversed(scope["headers"]))  # the first of a repeated name counts, as in the app
        uploads = scope["path"].rstrip("/").endswith("/upload")
        body = Body(headers.get(b"content-type", b"") if uploads else b"")
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > body.most:
            return await refuse(send)
        has_body = announced != b"0" or b"transfer-encoding" in headers
        return await self.app(scope, *limited(receive, send, body, has_body))


class Body:
    """Counts the received bytes of a body: those of a form's files, which the app writes to disk, and all others."""

    def __init__(self, content_type: bytes):
        self.files = self.others = 0
        self.header, self.disposition, self.in_file = [b"", b""], b"", False
        self.form = self._parser(content_type)
        self.most = OTHER_BYTES + (UPLOAD_BYTES if self.form else 0)

    def _parser(self, content_type: bytes) -> Any:
        """Return the form parser that Gradio also uses; None if the content is not a form."""
        from python_multipart.multipart import MultipartParser, parse_options_header

        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            return None
        callbacks = {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}
        with suppress(ValueError):  # the boundary is too long
            return MultipartParser(options[b"boundary"], callbacks)
        return None

    def takes(self, piece: bytes) -> bool:
        """Count a piece; return False if the body is now too large."""
        files = self.files
        try:
            if self.form:
                self.form.write(piece)
        except ValueError:  # not a form after all; the app will refuse it too
            self.form = None
        self.others += len(piece) - (self.files - files)
        return self.files <= UPLOAD_BYTES and self.others <= OTHER_BYTES

    # Callbacks of the form's parser, with slices of bytes.

    def on_part_begin(self) -> None:
        self.disposition = b""

    def on_header_field(self, piece: bytes, start: int, end: int) -> None:
        self.header[0] += piece[start:end]

    def on_header_value(self, piece: bytes, start: int, end: int) -> None:
        self.header[1] += piece[start:end]

    def on_header_end(self) -> None:
        if self.header[0].lower() == b"content-disposition":
            self.disposition = self.header[1]
        self.header = [b"", b""]

    def on_headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        self.in_file = b"filename" in parse_options_header(self.disposition)[1]

    def on_part_data(self, piece: bytes, start: int, end: int) -> None:
        if self.in_file:
            self.files += end - start


def limited(receive: Receive, send: Send, body: Body, has_body: bool) -> tuple[Receive, Send]:
    """Return a request's channels with the limit: beyond it the client gets 413 and the app a disconnect.

    If the app answers before it has read the whole body, the connection is closed; else the rest would be read too.
    """
    refused, answered, unread = False, False, has_body

    async def counted() -> Message:
        """Receive a message and count its body."""
        nonlocal refused, unread
        if refused:
            return {"type": "http.disconnect"}
        message = await receive()
        if body.takes(message.get("body", b"")):
            unread = message.get("more_body", False)
            return message
        refused = True
        if not answered:
            await refuse(send)
        return {"type": "http.disconnect"}

    async def sent(message: Message) -> None:
        """Send a message, unless the request was refused."""
        nonlocal answered
        answered = True
        if message["type"] == "http.response.start" and unread:
            message["headers"] = [*message.get("headers", ()), CLOSE]
        if not refused:
            await send(message)

    return counted, sent


async def refuse(send: Send) -> None:
    """Answer 413 and close the connection."""
    headers = [(b"content-type", b"text/plain"), CLOSE]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"more than this page takes"})
