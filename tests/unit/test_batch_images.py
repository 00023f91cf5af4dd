"""Batches with images: answered here, passed on to a server, and never too many of them in memory."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.batch import lines as lines_module
from headrace.batch import remote
from headrace.batch import run as run_module
from headrace.batch.lines import MAX_LINE_BYTES, LineReader, read_lines, scan
from headrace.batch.outputs import Paths
from headrace.batch.run import run_batch
from headrace.core.config import EngineConfig
from headrace.core.types import Request
from headrace.engine.client import InProcessClient
from headrace.engine.model import OpenModel
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint
from tests.unit.batch_cases import call, read_jsonl, tiny_model, write_lines
from tests.unit.batch_server import Batch, Plan, serving

CHAT = "/v1/chat/completions"
ROWS = 4
"""Placeholders of a tile of the tiny model."""


def picture(colour: str, size: tuple[int, int] = (20, 20)) -> str:
    """A data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def line(custom_id: str, *urls: str, **body: object) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]
    return call(custom_id, CHAT, messages=messages, **{"max_tokens": 3, **body})


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("model") / "seeing", "internvl_chat")


def answer(folder: Path, model: Path, *lines: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(answers, failures) by custom_id"""
    paths = Paths.beside(folder / "out.jsonl")
    opened = OpenModel(EngineConfig(str(model), threads=1, max_num_seqs=8, **settings))
    run_batch(opened, scan(write_lines(folder / "in.jsonl", lines)), paths.out)
    return tuple({one["custom_id"]: one["response"] for one in read_jsonl(path)} for path in (paths.out, paths.errors))  # type: ignore[return-value]


def test_lines_with_images_are_answered(seeing: Path, tmp_path: Path) -> None:
    one = picture("red")
    answers, failed = answer(
        tmp_path, seeing, line("none"), line("one", one), line("two", one, picture("blue", (56, 28)), n=2)
    )
    assert failed == {} and list(answers) == ["none", "one", "two"]
    tokens = {name: found["body"]["usage"]["prompt_tokens"] for name, found in answers.items()}
    # An image of one tile, and one of two with their thumbnail; around each `<img>`, `</img>` and a newline.
    assert tokens["one"] - tokens["none"] == ROWS + 3
    assert tokens["two"] - tokens["one"] == 3 * ROWS + 3
    assert len(answers["two"]["body"]["choices"]) == 2


def test_a_bad_image_is_its_lines_error(seeing: Path, tmp_path: Path) -> None:
    urls = {
        "no image": "data:image/png;base64,AAAA",
        "http": "http://127.0.0.1:9/a.png",
        "file": "file:///etc/passwd",
        "scheme": "ftp://example.org/a.png",
    }
    many = line("many", *[picture("red")] * 3)
    answers, failed = answer(
        tmp_path,
        seeing,
        *(line(name, picture("red"), url) for name, url in urls.items()),
        many,
        line("good"),
        max_images=2,
    )
    assert list(answers) == ["good"] and list(failed) == [*urls, "many"]
    for name in urls:
        error = failed[name]["body"]["error"]
        assert failed[name]["status_code"] == 400 and error["param"].startswith("messages[0].content[1].image_url"), (
            name
        )
    assert failed["no image"]["body"]["error"]["code"] == "invalid_image"


TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time"}}]


def test_tools_do_not_move_what_an_error_names(seeing: Path, tmp_path: Path) -> None:
    """The template knows no tools, so that they are told of in a message before the client's."""
    good, bad = line("good", picture("red"), tools=TOOLS), line("bad", picture("red"), "data:,", tools=TOOLS)
    answers, failed = answer(tmp_path, seeing, good, line("plain", picture("red")), bad)
    tokens = {name: found["body"]["usage"]["prompt_tokens"] for name, found in answers.items()}
    assert tokens["good"] > tokens["plain"]
    error = failed["bad"]["body"]["error"]
    assert (error["code"], error["param"]) == ("invalid_image", "messages[0].content[1].image_url.url")


def test_a_model_that_reads_none_says_so(tmp_path: Path) -> None:
    blind = tiny_model(tmp_path / "model")
    answers, failed = answer(tmp_path, blind, line("one", picture("red")), line("none"))
    assert list(answers) == ["none"]
    error = failed["one"]["body"]["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages[0].content[0].type")


def test_only_so_many_pixels_are_in_memory(seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = 28 * 28 * 3
    monkeypatch.setattr(run_module, "MOST_PIXEL_BYTES", 2 * tile)
    live: dict[str, int] = {}
    most = 0
    submit, poll = InProcessClient.submit, InProcessClient.poll

    def submitted(client: InProcessClient, request: Request) -> None:
        nonlocal most
        live[request.id] = sum(len(image.pixels) for image in request.images)
        most = max(most, sum(live.values()))
        submit(client, request)

    def polled(client: InProcessClient) -> Any:
        events = poll(client)
        for event in events:
            if type(event).__name__ != "TokenEvent":
                live.pop(event.request_id, None)
        return events

    monkeypatch.setattr(InProcessClient, "submit", submitted)
    monkeypatch.setattr(InProcessClient, "poll", polled)
    answers, failed = answer(tmp_path, seeing, *(line(f"r{k}", picture("red"), max_tokens=k + 1) for k in range(8)))
    assert len(answers) == 8 and failed == {}
    assert most == 2 * tile


# ---------------------------------------------------------------- long lines


def test_lines_with_images_may_be_long(tmp_path: Path) -> None:
    long = line("long", "data:image/png;base64," + "A" * MAX_LINE_BYTES)
    path = write_lines(tmp_path / "in.jsonl", [long, call("short")])

    def codes(reader: LineReader) -> list[str | None]:
        return [getattr(reader.read(one).error, "code", None) for one in read_lines(scan(path))]

    assert codes(LineReader()) == ["line_too_long", None]
    assert codes(LineReader(2 * MAX_LINE_BYTES)) == [None, None]


def test_a_line_beyond_all_bounds_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_IMAGE_LINE_BYTES", 1000)
    path = write_lines(tmp_path / "in.jsonl", [call("a", prompt="x" * 5000), call("b")])
    found = list(read_lines(scan(path)))
    assert [one.data is None for one in found] == [True, False]


# ---------------------------------------------------------------- against a server


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    plan = Plan()
    with serving(plan) as url:
        yield Batch(tmp_path, plan, url)


def test_images_are_passed_on_as_they_are(batch: Batch) -> None:
    lines = [line("a", "https://example.org/a.png"), line("b", "data:image/png;base64," + "A" * (MAX_LINE_BYTES + 1))]
    lines[0]["body"]["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    lines[0]["body"]["messages"][0]["content"].append({"type": "image", "image": ["whatever"]})
    for one in lines:  # the server of these tests reads the first message, a text
        one["body"]["messages"].insert(0, {"role": "system", "content": one["custom_id"]})
    write_lines(batch.source, lines)
    report = batch.run()
    assert (report.ok, report.failed) == (2, 0)
    assert all(json.loads(json.dumps(one["body"])) in batch.plan.bodies for one in lines)


def test_only_so_many_bodies_are_in_flight(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST_HELD", 3000)
    write_lines(batch.source, [call(f"r{k}", prompt="x" * 1000) for k in range(30)])
    report = batch.run(concurrency=16)
    assert (report.ok, report.failed) == (30, 0)
    assert batch.plan.most_at_once <= 3
