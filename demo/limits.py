"""Bodies of requests are bounded before they are read, whatever they announce."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
UPLOAD_BYTES = 200 << 20  # of all files sent at once
OTHER_BYTES = 1 << 20  # of everything else, since that is kept in memory
CLOSE = (b"connection", b"close")
TOLD = ("on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_headers_finished", "on_part_data")


class BodyLimit:
    """ASGI middleware that answers 413 to a request whose body is too large: at once if it says so, else when it is.

    Args:
        app: what answers the others.
        upload: bytes of the files in a form sent to .../upload.
        other: bytes beside these: of that form's fields and headers, and of any other request.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], upload: int = UPLOAD_BYTES, other: int = OTHER_BYTES):
        self.app, self.upload, self.other = app, upload, other

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(reversed(scope["headers"]))  # of a name that comes twice the first counts, as for the app
        uploads = scope["path"].rstrip("/").endswith("/upload")
        body = Body(headers.get(b"content-type", b"") if uploads else b"", self.upload, self.other)
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > body.most:
            return await refuse(send)
        has_body = announced != b"0" or b"transfer-encoding" in headers
        return await self.app(scope, *limited(receive, send, body, has_body))


class Body:
    """What has come of a body, as two counts: bytes of files, which the app puts on the disk, and all others.

    Args:
        content_type: of a form that may hold files; what is no form holds none.
        upload: bytes of files that it may have.
        other: bytes beside these.
    """

    def __init__(self, content_type: bytes, upload: int, other: int):
        self.upload, self.other, self.files, self.others = upload, other, 0, 0
        self.header, self.disposition, self.in_file = [b"", b""], b"", False
        self.form = parser_of(content_type, self)

    @property
    def most(self) -> int:
        """Bytes that it may have in all."""
        return self.other + (self.upload if self.form else 0)

    def takes(self, piece: bytes) -> bool:
        """Count a piece; False if that is too much."""
        files = self.files
        try:
            if self.form:
                self.form.write(piece)
        except ValueError:  # it is no form after all, as the app will see too
            self.form = None
        self.others += len(piece) - (self.files - files)
        return self.files <= self.upload and self.others <= self.other

    # What the form's parser tells, as slices of bytes.

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


def parser_of(content_type: bytes, listener: Any) -> Any:
    """Return the parser of a form, the same that Gradio uses; None if it is no form."""
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        return None
    try:
        return MultipartParser(options[b"boundary"], {name: getattr(listener, name) for name in TOLD})
    except ValueError:  # the boundary is too long
        return None


def limited(receive: Receive, send: Send, body: Body, has_body: bool) -> tuple[Receive, Send]:
    """Return a request's channels: after more than it may have the client gets 413, and the app sees it leave.

    Where the app answers before it has read the whole body, the connection is closed, or the rest would be read too.
    """
    refused, answered, unread = False, False, has_body

    async def counted() -> Message:
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
