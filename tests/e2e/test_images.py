"""Pictures through the library and the commands, on a tiny model that sees."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from headrace import LLM
from headrace.cli.main import main
from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError, InvalidParameter, UnsupportedParameter
from headrace.engine.images import ImagePrompt
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint

TILE = 28
SMALL: Mapping[str, Any] = {"threads": 1, "max_model_len": 256, "max_num_seqs": 8}
FLAGS = ("--threads", "1", "--max-model-len", "256")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("vision") / "nvlm", "nvlm", chat_template=False)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(str(path), **SMALL) as found:
        yield found


def picture(columns: int, rows: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows * TILE, columns * TILE, 3), np.uint8)


def asked(text: str, *images: object) -> list[dict[str, object]]:
    parts = [{"type": "image", "image": one} for one in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_together_is_one_by_one(llm: LLM) -> None:
    """Texts and requests of 1, 3 and 7 tiles; whatever the prefix cache holds by then."""
    prompts: list[Any] = [
        "A text.",
        ImagePrompt("Why?", [picture(1, 1)]),
        ImagePrompt("A <image> B <image>", [picture(2, 1), picture(1, 1, seed=1)]),
        asked("What?", picture(3, 2)),
        asked("And this?", picture(1, 1), picture(2, 1)),
        asked("No picture."),
    ]
    together = llm.generate(prompts, max_tokens=12, ignore_eos=True)
    alone = [llm.generate(prompt, max_tokens=12, ignore_eos=True)[0] for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(one.error is None and len(one.token_ids) == 12 for one in together)
    assert [one.cached_tokens > 0 for one in alone] == [len(one.prompt_token_ids) > 16 for one in alone]


def test_images_beside_prompts(llm: LLM) -> None:
    first, second = picture(1, 1), picture(2, 1)
    wanted = [ImagePrompt("a", [first]), ImagePrompt("b <image> <image>", [second, first]), "c"]
    expected = [one.token_ids for one in llm.generate(wanted, max_tokens=4)]
    found = llm.generate(["a", "b <image> <image>", "c"], images=[first, [second, first], None], max_tokens=4)
    assert [one.token_ids for one in found] == expected
    assert llm.generate("a", images=first, max_tokens=4)[0].token_ids == expected[0]
    assert llm.generate("a", images=[first], max_tokens=4)[0].token_ids == expected[0]
    with pytest.raises(InvalidParameter, match=r"images: got '1 of them', allowed: .* for each of the 2"):
        llm.generate(["a", "b"], images=[first])
    with pytest.raises(InvalidParameter, match="images: got 'list', allowed: none beside messages"):
        llm.generate(asked("x"), images=[first])


def test_only_the_same_picture_is_found_in_the_prefix_cache(llm: LLM) -> None:
    def cached(*images: object) -> tuple[int, int]:
        (answer,) = llm.chat(asked("What is it?", *images), max_tokens=4, ignore_eos=True)
        return answer.cached_tokens, len(answer.prompt_token_ids)

    one, other = picture(3, 2, seed=8), picture(3, 2, seed=9)
    before, count = cached(one)
    start = llm.opened.encode_prompt(asked("What is it?", one)).images[0].start
    assert before <= start, "no more than the system message"
    again, _ = cached(one)
    assert again == (count - 1) // 16 * 16
    assert cached(other)[0] <= start, "the same ids, other pixels"
    changed = one.copy()
    changed[-1, -1, -1] ^= 1
    assert cached(changed)[0] <= start, "one bit of it"
    both, _ = cached(one, other)
    assert start + 16 < both < count, "the picture is found again, and not what follows it"
    assert cached(picture(3, 2, seed=10), one)[0] <= start, "nor where it stands elsewhere"


def test_several_answers_to_a_picture(llm: LLM) -> None:
    answers = llm.chat(asked("What?", picture(2, 1)), n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    alone = [llm.chat(asked("What?", picture(2, 1)), temperature=1.0, seed=one.seed, max_tokens=6, ignore_eos=True)[0]
             for one in answers]  # fmt: skip
    assert [one.token_ids for one in answers] == [one.token_ids for one in alone]


def test_a_picture_asked_about_by_many_is_computed_once(llm: LLM) -> None:
    """Who comes with the same picture waits for its blocks; who comes with another does not find them."""

    def computed(*seeds: int) -> int:
        before = llm.stats.computed_tokens
        answers = llm.chat([asked("Who?", picture(2, 2, seed=seed)) for seed in seeds], max_tokens=1)
        assert not any(one.error for one in answers)
        return llm.stats.computed_tokens - before

    one = computed(100)
    assert computed(101, 101, 101) <= one + 2 * 17, "the last block of each, at most"
    assert computed(102, 103, 104) > 2.5 * one


def test_one_bad_picture_fails_alone(llm: LLM) -> None:
    prompts = [asked("x", b"no picture"), asked("x", picture(1, 1)), asked("<|vision_pad|>", picture(1, 1))]
    bad, good, typed = llm.chat(prompts, max_tokens=4)
    assert bad.error is not None and bad.error.code == "invalid_image"
    assert bad.error.message.startswith("messages[0].content[0].image: got ")
    assert good.error is None and good.token_ids
    assert typed.error is not None and typed.error.message.startswith("messages[0].content[1].text: got ")
    long = llm.chat(asked("x", *[picture(3, 2)] * 10), max_tokens=4)[0]
    assert long.error is not None and long.error.code == "context_length_exceeded"


def test_pictures_wait_for_memory(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [ImagePrompt(f"{index} <image>", [picture(2, 1, seed=index)]) for index in range(6)]
    expected = [one.token_ids for one in llm.generate(prompts, max_tokens=6, ignore_eos=True)]
    monkeypatch.setattr("headrace.engine.llm.MOST_PIXEL_BYTES", 1)
    before = llm.stats.iterations
    answers = llm.generate(prompts, max_tokens=6, ignore_eos=True)
    assert [one.token_ids for one in answers] == expected
    assert llm.stats.iterations - before >= 36, "one after the other"


def test_settings(path: Path, llm: LLM) -> None:
    assert llm.config.backend == "torch"
    assert llm.config.reasons["backend"] == "torch: the one that reads images"
    with pytest.raises(ConfigError, match="backend: got 'native', allowed for a model that reads images: auto, torch"):
        LLM(str(path), backend="native")
    for name, value in (
        ("max_images", 0),
        ("max_image_mib", "x"),
        ("allow_image_urls", 1),
        ("image_folder", None),
        ("image_folder", "/nowhere"),
        ("prompt_form", "x"),
        ("prompt_form", "train"),
    ):
        with pytest.raises(InvalidParameter, match=f"{name}: got"):
            LLM(str(path), **{name: value})


def test_forms_of_a_conversation(path: Path, llm: LLM, tmp_path: Path) -> None:
    own = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages[0]['content'] }}"}
    folder = shutil.copytree(path, tmp_path / "templated")
    (folder / "tokenizer_config.json").write_text(json.dumps(own), "utf-8")
    templated = replace(llm.opened.requested, model=str(folder))

    def head(config: EngineConfig) -> str:
        opened = OpenModel(config)
        ids = opened.encode([{"role": "user", "content": "Hi"}])
        opened.tokenizer.close()
        return opened.tokenizer.decode(ids, skip_special_tokens=False)

    system = "<|im_start|>system\nFollow the user's instruction and answer questions.<|im_end|>"
    assert head(templated) == "Hi", "its own template first"
    assert head(replace(templated, prompt_form="chatml")).startswith(f"{system}\n<|im_start|>user")
    assert head(replace(templated, prompt_form="mpt")).startswith(f"{system}<|im_start|>user")
    assert head(llm.opened.requested).startswith(f"{system}\n<|im_start|>user")


def test_a_model_that_reads_none(tmp_path: Path) -> None:
    blind = OpenModel(EngineConfig(str(tiny_checkpoint(tmp_path / "text", "llama")), backend="torch"))
    for prompt in (ImagePrompt([1, 2], [picture(1, 1)]), asked("x", picture(1, 1))):
        with pytest.raises(UnsupportedParameter, match="this model reads no images"):
            blind.encode_prompt(prompt)
    assert blind.encode_prompt(ImagePrompt([1, 2], [])).token_ids == (1, 2)
    assert blind.limits.images is None
    with pytest.raises(InvalidParameter, match="prompt_form: got 'chatml', allowed: auto for this model"):
        OpenModel(replace(blind.requested, prompt_form="chatml"))


# ---------------------------------------------------------------- commands


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = []
    for index, size in enumerate([(1, 1), (2, 1)]):
        found.append(tmp_path / f"{index}.png")
        Image.fromarray(picture(*size, seed=index)).save(found[-1])
    return found


def test_generate(path: Path, llm: LLM, files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    images = [flag for file in files for flag in ("--image", str(file))]
    command = ["generate", str(path), *FLAGS, "--json", "--max-tokens", "6"]
    assert main([*command, *images, "--prompt", "One <image>, two <image>."]) == 0
    found = json.loads(capsys.readouterr().out)
    (expected,) = llm.generate("One <image>, two <image>.", images=files, max_tokens=6)
    assert tuple(found["token_ids"]) == expected.token_ids and found["text"] == expected.text
    wrong = ["--image", __file__, "--prompt", "x"]
    assert main([*command, *wrong]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "invalid_image"
    assert captured.err.startswith("headrace: error: request 0: --image: got ")
    assert main([*command, *images, "--prompt", "x", "--prompt", "y"]) == 2
    assert "--image: got" in capsys.readouterr().err


def test_generate_reads_urls_of_a_file_of_prompts(
    path: Path, llm: LLM, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    part = {"type": "image_url", "image_url": {"url": files[1].as_uri()}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Hm?"}]}]
    lines.write_text(json.dumps({"messages": messages}) + "\n", "utf-8")
    command = ["generate", str(path), *FLAGS, "--json", "--max-tokens", "6", "--prompt-file", str(lines)]
    assert main([*command, "--image-folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    (expected,) = llm.chat(asked("Hm?", files[1]), max_tokens=6)
    assert tuple(found["token_ids"]) == expected.token_ids
    assert main(command) == 1, "unless the folder is allowed"
    assert "messages[0].content[0].image_url.url: got 'file://" in capsys.readouterr().err


def talk(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    status = main(["chat", *arguments, *FLAGS, "--max-tokens", "5", "--ignore-eos"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_chat(
    path: Path,
    llm: LLM,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved.json"
    lines = ["First?", f"/image {files[1]}", "Second?", "/retry", f"/save {saved}", "/new", "Third?", "/image nowhere"]
    status, out, err = talk(lines, monkeypatch, capsys, str(path), "--image", str(files[0]))
    first = asked("First?", files[0])
    answers = [llm.chat(first, max_tokens=5, ignore_eos=True)[0].text]
    second = [*first, {"role": "assistant", "content": answers[0]}, *asked("Second?", files[1])]
    answers += [llm.chat(second, max_tokens=5, ignore_eos=True)[0].text] * 2
    answers.append(llm.chat([{"role": "user", "content": "Third?"}], max_tokens=5, ignore_eos=True)[0].text)
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert "1.png, of 12 tokens, goes with the next message." in err
    assert "headrace: error: /image: got 'nowhere'" in err and status == 1
    messages = json.loads(saved.read_text("utf-8"))
    assert messages[0]["content"][0] == {"type": "image_url", "image_url": {"url": files[0].as_uri()}}
    assert [one["role"] for one in messages] == ["user", "assistant", "user", "assistant"]
    with_folder = replace(llm.opened.requested, image_folder=str(tmp_path))
    assert type(llm.opened)(with_folder).encode(messages[:3]) == llm.opened.encode(second), "the file is read again"


def test_chat_without_eyes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, out, err = talk([], monkeypatch, capsys, str(path), "--image", "nowhere.png")
    assert (status, out) == (2, "") and "--image: got 'nowhere.png', allowed: a regular file" in err
