"""The pictures of image6, workloads with images, and what becomes of them in manifests, certificates and methods."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL
import pytest
from PIL import Image, ImageChops, ImageStat

from headrace.compare.certificate_reader import read_certificate
from headrace.compare.check import changed_parts
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.outside import make_outside
from headrace.compare.methods.rows import Row, _admit, open_answers
from headrace.compare.methods.url import UrlMethod
from headrace.compare.pictures import NAMES, SCHEME, PictureReader, picture, with_pixels
from headrace.compare.questions import IMAGE6
from headrace.compare.workload_spec import WorkloadOptions, read_workload, write_manifest
from headrace.compare.workloads import Workload, WorkloadRequest, from_manifest
from headrace.core.config import EngineConfig
from headrace.core.errors import (
    ConfigError,
    EngineError,
    InputFileError,
    InvalidImage,
    InvalidParameter,
    UnsupportedParameter,
)
from headrace.core.types import ImageSpan
from headrace.engine.model import OpenModel
from headrace.pages.files import ReportFile
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint
from tests.unit.certificate_cases import make, open_tiny

NONE = WorkloadOptions()
SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_pictures.py"
VERBATIM = (
    "<image>\nExplain why this meme is funny",
    "<image>\nWhat is the difference between the left, middle and right object in the image?",
    "<image>\nYou are a helpful driving assistant. In this scene, which lane should I choose and why?",
    "<image>\nWrite code based on the provided pseudo code",
    "<image>\nAccording to the table, explain which food is the most likely cause of the outbreak of food poisoning?",
    "<image>\nWhat percentage of market share does NVIDIA have for data center GPUs in 2023?",
)


@pytest.fixture(scope="module")
def seeing_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("models") / "seeing", "internvl_300m_hf")


@pytest.fixture(scope="module")
def seeing(seeing_path: Path) -> Iterator[OpenModel]:
    with closing(open_tiny(seeing_path, max_model_len=512)) as opened:
        yield opened


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    with closing(open_tiny(tiny_checkpoint(tmp_path_factory.mktemp("models") / "blind"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def asked(seeing: OpenModel) -> Workload:
    return read_workload("image6", seeing, WorkloadOptions(max_tokens=4))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_pictures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestFiles:
    @pytest.mark.parametrize("name", NAMES)
    def test_each_is_a_small_png_that_is_full_of_something(self, name: str) -> None:
        data = picture(name)
        assert len(data) < 60_000
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            found = opened.convert("RGB")
        colours = found.getcolors(2**24)
        assert min(found.size) >= 480 and max(found.size) <= 1200 and colours is not None and len(colours) > 16

    def test_their_shapes_differ(self, seeing: OpenModel, asked: Workload) -> None:
        shapes = [Image.open(io.BytesIO(picture(name))).size for name in NAMES]
        assert len({round(width / height, 2) for width, height in shapes}) == len(NAMES)
        assert len({one.images[0].tiles for one in asked.requests}) >= 3
        assert len({one.images[0].hash for one in asked.requests}) == len(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_script_draws_what_the_files_show(self, script: ModuleType, name: str) -> None:
        """Another version of Pillow than the one that drew a file may round its letters otherwise."""
        draw, colours = script.PICTURES[name]
        drawn = draw().finish(colours).convert("RGB")
        with Image.open(io.BytesIO(picture(name))) as opened:
            same = opened.info["Software"] == f"Pillow {PIL.__version__}"
            kept = opened.convert("RGB")
        assert drawn.size == kept.size
        assert max(ImageStat.Stat(ImageChops.difference(drawn, kept)).mean) < (0.02 if same else 3)

    def test_the_script_writes_every_file(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert tuple(script.PICTURES) == NAMES and script.FOLDER.samefile(
            SCRIPT.parents[1] / "src/headrace/compare/pictures"
        )
        monkeypatch.setattr(script, "PICTURES", {"food_table": (script.food_table, 8)})
        script.main(tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["food_table.png"]

    def test_the_table_is_the_studys(self, script: ModuleType) -> None:
        rates = {food: sick / ate for food, ate, sick in script.FOODS}
        assert max(rates, key=rates.__getitem__) == "Potato salad"
        wanted = {"Cold chicken": 39.5, "Potato salad": 70.4, "Egg sandwiches": 52.6, "Fruit pie and cream": 37.5}
        assert {food: round(100 * rate, 1) for food, rate in rates.items()} == wanted | {"Cheese": 25.0}
        assert sum(share for _, share in script.SHARES) == 100

    def test_another_name(self) -> None:
        with pytest.raises(InvalidParameter, match=r"^picture: got '\.\./workloads', allowed: meme, "):
            picture("../workloads")


class TestImage6:
    def test_the_questions_are_the_studys(self, asked: Workload) -> None:
        assert tuple(one.text for one in IMAGE6) == VERBATIM == tuple(one.text for one in asked.requests)
        assert tuple(one.picture for one in IMAGE6) == NAMES
        assert [one.sources for one in asked.requests] == [(f"{SCHEME}{name}",) for name in NAMES]

    def test_prompts(self, seeing: OpenModel, asked: Workload) -> None:
        assert asked.max_tokens == 4 and asked.templated and asked.together and asked.seed is None
        for one, name in zip(asked.requests, NAMES, strict=True):
            content = [
                {"type": "image", "image": picture(name)},
                {"type": "text", "text": one.text.removeprefix("<image>\n")},
            ]
            encoded = seeing.encode_prompt([{"role": "user", "content": content}])
            assert (one.token_ids, one.images) == (encoded.token_ids, encoded.images)
            (image,) = one.images
            assert seeing.spec.vision is not None
            rows = image.tiles * seeing.spec.vision.projector.tokens
            assert one.token_ids.count(seeing.spec.vision.image_token_id) == rows and image.pixels

    def test_asked_again_they_share_their_pixels(self, seeing: OpenModel) -> None:
        found = read_workload("image6", seeing, WorkloadOptions(num_requests=8, arrivals="gap:0.5"))
        assert found.requests[6].images[0].pixels is found.requests[0].images[0].pixels
        assert found.requests[7].arrival_s == 3.5 and "The 6 requests are asked again" in found.notes[0]

    def test_a_model_that_reads_no_images(self, blind: OpenModel) -> None:
        with pytest.raises(UnsupportedParameter, match=r"^workload: got 'image6', .*this model reads no images"):
            read_workload("image6", blind, NONE)

    def test_a_context_that_is_too_short(self, seeing_path: Path) -> None:
        with closing(open_tiny(seeing_path, max_model_len=128)) as opened, pytest.raises(InvalidParameter) as error:
            read_workload("image6", opened, WorkloadOptions(max_tokens=100))
        assert error.value.field == "max_tokens"

    def test_pixels_are_bounded(self, seeing: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("headrace.compare.pictures.MOST_PIXEL_BYTES", 10_000)
        with pytest.raises(InvalidParameter, match=r"^here: got '.* bytes of pixels up to it'.*take fewer"):
            PictureReader(seeing).read(f"{SCHEME}meme", "here")


def with_images(**changes: Any) -> dict[str, Any]:
    """A manifest of one request with an image, and what is changed in that."""
    image = ImageSpan(1, 4, "ab" * 32, 1, b"pixels")
    request = WorkloadRequest((1, 7, 7, 7, 7, 2), 3, images=(image,), sources=("picture:meme",))
    manifest = Workload("one", (request,)).manifest()
    manifest["requests"][0]["images"][0] |= changes
    return manifest


class TestManifests:
    def test_without_images_nothing_is_new(self) -> None:
        found = Workload("plain", (WorkloadRequest((1, 2, 3), 4, title="t"),)).manifest()
        assert "images" not in found["requests"][0]
        assert found["sha256"] == "c9e9525f264976691e6cf2d62f34536606cc00bed75a845d121823d5670e9754"

    def test_round_trip_without_pixels(self) -> None:
        manifest = with_images()
        assert b"pixels" not in json.dumps(manifest).encode()
        found = from_manifest(json.loads(json.dumps(manifest)))
        (request,) = found.requests
        assert request.images == (ImageSpan(1, 4, "ab" * 32, 1),) and request.sources == ("picture:meme",)
        assert found.manifest() == manifest

    @pytest.mark.parametrize("change", [{"hash": "cd" * 32}, {"start": 0}, {"tiles": 2}, {"length": 3}])
    def test_the_hash_covers_what_is_seen(self, change: dict[str, Any]) -> None:
        with pytest.raises(InvalidParameter, match=r"^sha256: "):
            from_manifest(with_images(**change))

    @pytest.mark.parametrize(
        "change",
        [{"hash": "ab"}, {"hash": 3}, {"start": -1}, {"start": True}, {"length": 0}, {"tiles": 0.5}, {"source": None}],
    )
    def test_what_is_wrong_is_named(self, change: dict[str, Any]) -> None:
        (name,) = change
        with pytest.raises(InvalidParameter, match=rf"^requests\[0\]\.images\[0\]\.{name}: "):
            from_manifest(with_images(**change))

    @pytest.mark.parametrize("images", [[], {}, "x", None, [3]])
    def test_images_are_a_list_of_objects(self, images: object) -> None:
        manifest = with_images()
        manifest["requests"][0]["images"] = images
        with pytest.raises(InvalidParameter, match=r"^requests\[0\]\.images"):
            from_manifest(manifest)

    def test_written_and_run_again(self, seeing: OpenModel, asked: Workload, tmp_path: Path) -> None:
        path = tmp_path / "image6.json"
        write_manifest(asked, ReportFile("manifest", str(path)))
        assert read_workload(str(path), seeing, NONE) == asked
        assert path.stat().st_size < 100_000

    def test_for_a_model_that_sees_something_else(self, asked: Workload, blind: OpenModel, tmp_path: Path) -> None:
        path = tmp_path / "image6.json"
        write_manifest(asked, ReportFile("manifest", str(path)))
        larger = tiny_vision_checkpoint(
            tmp_path / "larger", "internvl_300m_hf", vision={"image_size": 56, "patch_size": 14}
        )
        with (
            closing(open_tiny(larger, max_model_len=512)) as other,
            pytest.raises(InputFileError, match=r"requests\[0\]\.images\[0\]\.hash: .*what this model sees in it now"),
        ):
            read_workload(str(path), other, NONE)
        short = replace(asked, requests=tuple(replace(one, token_ids=(5, 6)) for one in asked.requests))
        write_manifest(short, ReportFile("manifest", str(path)))
        with pytest.raises(InputFileError, match=r"requests\[0\]\.images\[0\]\.source: .*this model reads none"):
            read_workload(str(path), blind, NONE)

    def test_a_picture_or_place_that_is_not_there(self, seeing: OpenModel, asked: Workload) -> None:
        first = asked.requests[0]
        (image,) = first.images
        cases: dict[str, WorkloadRequest] = {
            r"requests\[0\]\.images\[0\]\.source: got 'file": replace(first, sources=("file:///etc/hostname",)),
            r"picture: got 'cat'": replace(first, sources=(f"{SCHEME}cat",)),
            r"requests\[0\]\.images\[0\]: .* by the prompt": replace(
                first, images=(replace(image, start=image.start + 1),)
            ),
            r"prompt_token_ids: .* placeholder tokens": replace(first, token_ids=first.token_ids[: image.start + 2]),
        }
        for said, request in cases.items():
            with pytest.raises((InvalidParameter, InvalidImage), match=said):
                with_pixels(replace(asked, requests=(request,)), seeing)

    def test_a_data_url_is_its_own_source(self, seeing: OpenModel) -> None:
        url = "data:image/png;base64," + base64.b64encode(picture("food_table")).decode()
        (plain,) = seeing.encode_prompt(
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        ).images
        assert PictureReader(seeing).read(url, "here").hash == plain.hash


class TestMethods:
    def test_images_enter_the_rows(self, seeing: OpenModel, asked: Workload) -> None:
        answers = open_answers(seeing, asked, "test")
        for answer, one in zip(answers, asked.requests, strict=True):
            (image,) = _admit(Row(0, range(9), answer, list(answer.request.token_ids))).images
            assert image.pixels and replace(image, hash=one.images[0].hash) == one.images[0]

    def test_an_image_in_the_wrong_place_fails(self, seeing: OpenModel, asked: Workload) -> None:
        first = asked.requests[0]
        moved = replace(first, images=(replace(first.images[0], start=0),))
        with pytest.raises(EngineError, match="test request 1 failed"):
            open_answers(seeing, replace(asked, requests=(moved,)), "test")

    def test_a_server_and_an_outside_engine_refuse_them(self, seeing: OpenModel, asked: Workload) -> None:
        bench = Bench(seeing)
        for method in (UrlMethod("url:http://127.0.0.1:1", bench), make_outside("transformers:fp32", bench)):
            with closing(method), pytest.raises(ConfigError, match=r"workload image6 has images: .* token ids"):
                method.start(asked)


@pytest.fixture(scope="module")
def certified(seeing_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = OpenModel(EngineConfig(str(seeing_path), threads=1, max_model_len=512, prefix_cache=False))
    short = read_workload("image6", opened, WorkloadOptions(max_tokens=3, num_requests=2))
    path = tmp_path_factory.mktemp("certificates") / "certificate.json"
    path.write_text(json.dumps(make(opened, short), allow_nan=False), encoding="utf-8")
    return path


class TestCertificates:
    def test_it_names_the_pictures_and_their_hashes(self, certified: Path, asked: Workload) -> None:
        certificate = read_certificate(certified)
        assert changed_parts(certificate) == []
        for one, wanted in zip(certificate.workload.requests, asked.requests[:2], strict=True):
            assert one.sources == wanted.sources and one.images[0].hash == wanted.images[0].hash
            assert not one.images[0].pixels

    def test_another_picture_is_a_changed_part(self, certified: Path, tmp_path: Path) -> None:
        for name, value in (("hash", "cd" * 32), ("source", "picture:road"), ("tiles", 1)):
            found = json.loads(certified.read_text(encoding="utf-8"))
            assert found["workload"]["requests"][1]["images"][0][name] != value
            found["workload"]["requests"][1]["images"][0][name] = value
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(found), encoding="utf-8")
            assert [one.part for one in changed_parts(read_certificate(path))] == ["workload.requests.1"]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"hash": "xy"}, r"images\.0\.hash"),
            ({"tiles": 0}, r"images\.0\.tiles"),
            ({"source": 4}, r"images\.0\.source"),
            ({"more": 1}, r"requests: "),
        ],
    )
    def test_it_is_read_strictly(self, certified: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        found = json.loads(certified.read_text(encoding="utf-8"))
        found["workload"]["requests"][0]["images"][0] |= change
        path = tmp_path / "wrong.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        with pytest.raises(InputFileError, match=said):
            read_certificate(path)
