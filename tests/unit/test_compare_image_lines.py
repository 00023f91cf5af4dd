"""Files of requests whose messages have pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from headrace.compare.pictures import picture
from headrace.compare.workload_spec import WorkloadOptions, read_workload, write_manifest
from headrace.core.errors import InputFileError
from headrace.engine.model import OpenModel
from headrace.pages.files import ReportFile
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint
from tests.unit.certificate_cases import open_tiny

NONE = WorkloadOptions()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    path = tiny_vision_checkpoint(tmp_path_factory.mktemp("models") / "seeing", "internvl_300m_hf")
    with closing(open_tiny(path, max_model_len=512)) as opened:
        yield opened


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(name)).decode()


def image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, object]:
    return {"type": "text", "text": said}


def written(folder: Path, *contents: object) -> str:
    rows = [{"messages": [{"role": "user", "content": content}], "max_tokens": 4} for content in contents]
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pictures_in_their_places(seeing: OpenModel, tmp_path: Path) -> None:
    table, road = data_url("food_table"), data_url("road")
    contents = (
        [text("First"), image(table), text("then"), image(road), text("and?")],
        "no picture",
        [image(table), image(table)],
    )
    found = read_workload(written(tmp_path, *contents), seeing, NONE)
    first, plain, twice = found.requests
    assert first.sources == (table, road) and first.text == "user: First\n<image>\nthen\n<image>\nand?"
    assert twice.sources == (table, table) and (plain.images, plain.sources) == ((), ())
    for one, content in zip(found.requests, contents, strict=True):
        encoded = seeing.encode_prompt([{"role": "user", "content": content}])
        assert (one.token_ids, one.images) == (encoded.token_ids, encoded.images)
    assert twice.images[0].pixels is first.images[0].pixels, "read once"

    path = tmp_path / "again.json"
    write_manifest(found, ReportFile("manifest", str(path)))
    assert read_workload(str(path), seeing, NONE) == found


def test_where_it_is_wrong_is_told(seeing: OpenModel, tmp_path: Path) -> None:
    field = r"messages\[0\]\.content\[1\]\.image_url\.url"
    for url in ("http://example.com/a.png", "file:///etc/hostname", "data:image/png;base64,AAAA", "ftp://x/y"):
        path = written(tmp_path, "fine", [text("see"), image(url)])
        with pytest.raises(InputFileError, match=rf"requests\.jsonl, line 2: {field}: "):
            read_workload(path, seeing, NONE)


def test_a_model_that_reads_no_images(tmp_path: Path) -> None:
    from headrace.testing.tiny_tokenizer import write_tiny_tokenizer

    blind = tiny_checkpoint(tmp_path / "blind", vocab_size=384)
    write_tiny_tokenizer(blind, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    with closing(open_tiny(blind)) as opened, pytest.raises(InputFileError, match=r"line 1: .*reads no images"):
        read_workload(written(tmp_path, [image(data_url("road"))]), opened, NONE)
