"""Pictures of workloads: the six that are asked about in image6, drawn by `scripts/draw_pictures.py` and kept as files,
and whatever else a workload names, read once each.

Files, and not the script, since another version of Pillow may draw a pixel otherwise: a workload's hash covers pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.errors import InvalidParameter
from headrace.engine.images import ImagePrompt, Picture

if TYPE_CHECKING:
    from headrace.core.types import ImageSpan
    from headrace.engine.model import OpenModel
    from headrace.media.prepare import Prepared

NAMES: Final = ("meme", "objects", "road", "pseudo_code", "food_table", "market_share")
"""What each shows is told in `compare/questions.py`."""
SCHEME: Final = "picture:"
"""What the source of one of them begins with; any other source is a URL."""
MOST_PIXEL_BYTES: Final = 4 * 2**30
"""Of all the pictures of a workload together: they stay in memory while it runs."""
_FOLDER: Final = Path(__file__).parent


def picture(name: str) -> bytes:
    """The PNG file of one of ours. Raises InvalidParameter."""
    if name not in NAMES:
        raise InvalidParameter("picture", name, ", ".join(NAMES))
    return (_FOLDER / f"{name}.png").read_bytes()


class PictureReader:
    """Makes tiles of the pictures of a workload for one model, of each source once."""

    def __init__(self, opened: OpenModel) -> None:
        self._opened = opened
        self._read: dict[str, Prepared] = {}
        self._pixel_bytes = 0

    def read(self, source: str, field: str) -> Prepared:
        """`source`: picture:NAME or a URL that the model's settings allow; `field`: what errors call it. Raises
        InvalidParameter, InvalidImage."""
        found = self._read.get(source)
        if found is None:
            images = self._opened.images
            if images is None:
                raise InvalidParameter(field, source, "no image, since this model reads none")
            ours = source.startswith(SCHEME)
            found = images.prepare_one(Picture(picture(source.removeprefix(SCHEME)) if ours else source, field))
            self._pixel_bytes += len(found.pixels)
            if self._pixel_bytes > MOST_PIXEL_BYTES:
                allowed = f"up to {MOST_PIXEL_BYTES} in all requests together: take fewer"
                raise InvalidParameter(field, f"{self._pixel_bytes} bytes of pixels up to it", allowed)
            self._read[source] = found
        return found

    def into(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], Mapping[str, str]]:
        """Messages, as `api.messages` has them, with the pictures of their image_url parts; and the hash of each -> its
        URL, for a template may show them in another order. Raises as `read`."""
        urls: dict[str, str] = {}

        def seen(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
            if part["type"] != "image_url":
                return part
            url = part["image_url"]["url"]
            image = self.read(url, f"{where}.image_url.url")
            urls[image.hash] = url
            return {"type": "image", "image": image}

        found: list[Mapping[str, Any]] = []
        for place, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list):
                parts = [seen(part, f"messages[{place}].content[{index}]") for index, part in enumerate(content)]
                message = {**message, "content": parts}
            found.append(message)
        return found, urls


def with_pixels(workload: Workload, opened: OpenModel, where: str = "requests[{}]") -> Workload:
    """A workload that was written, with the pixels of its images, which are read again from where they came.

    `where`: what errors call a request; {}: its index. Raises InvalidParameter where an image is not, for this model,
    the one that was written down.
    """
    reader = PictureReader(opened)
    requests = [_with_pixels(one, opened, reader, where.format(i)) for i, one in enumerate(workload.requests)]
    return replace(workload, requests=tuple(requests))


def _with_pixels(asked: WorkloadRequest, opened: OpenModel, reader: PictureReader, where: str) -> WorkloadRequest:
    if not asked.images:
        return asked
    fields = [f"{where}.images[{index}]" for index in range(len(asked.images))]
    found = [reader.read(source, f"{field}.source") for source, field in zip(asked.sources, fields, strict=True)]
    for image, span, field in zip(found, asked.images, fields, strict=True):
        if image.hash != span.hash:
            raise InvalidParameter(f"{field}.hash", span.hash, f"{image.hash}, of what this model sees in it now")
    images = opened.encode_prompt(ImagePrompt(asked.token_ids, found, fields)).images
    for now, span, field in zip(images, asked.images, fields, strict=True):
        if _place(now) != _place(span):
            said = "{} tiles at {}, {} tokens"
            raise InvalidParameter(field, said.format(*_place(span)), f"{said.format(*_place(now))}, by the prompt")
    return replace(asked, images=images)


def _place(span: ImageSpan) -> tuple[int, int, int]:
    return span.tiles, span.start, span.length
