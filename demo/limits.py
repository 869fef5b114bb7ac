"""Bodies of requests are bounded before they are read, whatever they announce."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
UPLOAD_BYTES = 200 << 20  # of all files sent at once
OTHER_BYTES = 1 << 20
CLOSE = (b"connection", b"close")


class BodyLimit:
    """ASGI middleware that answers 413 to a request whose body is too large: at once if it says so, else when it is.

    Args:
        app: what answers the others.
        upload: bytes of a request to .../upload.
        other: bytes of any other request.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], upload: int = UPLOAD_BYTES, other: int = OTHER_BYTES):
        self.app, self.upload, self.other = app, upload, other

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.upload if scope["path"].rstrip("/").endswith("/upload") else self.other
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > most:
            return await refuse(send)
        has_body = announced != b"0" or b"transfer-encoding" in headers
        return await self.app(scope, *limited(receive, send, most, has_body))


def limited(receive: Receive, send: Send, most: int, has_body: bool) -> tuple[Receive, Send]:
    """Return a request's channels: after more than `most` bytes the client gets 413, and the app sees it leave.

    Where the app answers before it has read the whole body, the connection is closed, or the rest would be read too.
    """
    count, refused, answered, unread = 0, False, False, has_body

    async def counted() -> Message:
        nonlocal count, refused, unread
        if refused:
            return {"type": "http.disconnect"}
        message = await receive()
        count += len(message.get("body", b""))
        if count <= most:
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
