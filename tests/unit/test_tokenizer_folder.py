"""Tokenizers of Hugging Face folders, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from headrace.core.errors import CheckpointError, TemplateError, UnsupportedModel
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.tokenizer_cases import MODEL, TRAINING, tricky_strings


@dataclass
class Folder:
    """As much of a checkpoint as a tokenizer reads."""

    path: Path
    config: Mapping[str, object] = field(default_factory=dict)
    format: str = "hf"


def load(folder: Folder) -> Tokenizer:
    return load_tokenizer(folder)  # type: ignore[arg-type]


def byte_level_raw(bos: bool) -> RawTokenizer:
    raw = RawTokenizer(models.BPE(MODEL["vocab"], [tuple(merge) for merge in MODEL["merges"]]))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    if bos:
        ids = [("<s>", raw.token_to_id("<s>"))]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return raw


def unigram_raw() -> RawTokenizer:
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(TRAINING * 3, trainer)
    ids = [("<s>", raw.token_to_id("<s>"))]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return raw


def write(folder: Path, raw: RawTokenizer, **files: object) -> Folder:
    raw.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Folder(folder)


NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
TOKEN_X = {"__type": "AddedToken", "content": "<|x|>", "lstrip": True, "special": True}
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TOKEN_X = {"__type": "AddedToken", "content": "<|x|>", "special": True, **FLAGS, "lstrip": True}
TOKEN_PAD = {"__type": "AddedToken", "content": "<pad>", **FLAGS}
CONFIGS: list[dict[str, object]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"additional_special_tokens": ["the", TOKEN_X]},
    {"pad_token": TOKEN_PAD},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bpe", "bpe_bos", "unigram"])
@pytest.mark.parametrize("changes", CONFIGS)
def test_folder_equals_transformers(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = unigram_raw() if kind == "unigram" else byte_level_raw(bos=kind == "bpe_bos")
    raw.enable_truncation(4)
    raw.enable_padding(length=8, pad_token="</s>")
    ours = load(write(tmp_path, raw, tokenizer_config=NAMED | changes))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    for text in [*tricky_strings(120, seed=11), "<s>a</s> the <|x|> <pad>"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == expected


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_decoder(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = byte_level_raw(bos=False)
    size = raw.get_vocab_size()
    added = {
        str(size + 1): {"content": "<tool>", "special": False, "normalized": False},
        str(size): {"content": "<new>", "special": True},
    }
    ours = load(write(tmp_path, raw, tokenizer_config=NAMED | {"added_tokens_decoder": added}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.encode("a<new>b<tool>c") == theirs("a<new>b<tool>c")["input_ids"]
    assert ours.decode([size, size + 1]) == "<tool>" == theirs.decode([size, size + 1], skip_special_tokens=True)
    added[str(size + 7)] = {"content": "<gap>"}
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder\.\d+ is '<gap>'"):
        load(write(tmp_path, raw, tokenizer_config=NAMED | {"added_tokens_decoder": added}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_decoder", [True, False])
def test_special_tokens_map(tmp_path: Path, with_decoder: bool) -> None:
    """The older file of names wins, but only where tokenizer_config.json lists no added tokens."""
    from transformers import PreTrainedTokenizerFast

    raw = byte_level_raw(bos=False)
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = NAMED | ({"added_tokens_decoder": {str(raw.token_to_id("</s>")): token}} if with_decoder else {})
    names = {"bos_token": token, "unk_token": "<s>"}
    ours = load(write(tmp_path, raw, tokenizer_config=config, special_tokens_map=names))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.special_tokens == {key: str(value) for key, value in theirs.special_tokens_map.items()}


def test_eos_ids_by_precedence(tmp_path: Path) -> None:
    raw = byte_level_raw(bos=False)
    folder = write(tmp_path, raw, tokenizer_config=NAMED)
    eos = raw.token_to_id("</s>")
    assert load(folder).eos_token_ids == {eos}
    for decoder in ("text_config", "llm_config"):  # of a model that sees
        folder.config = {decoder: {"eos_token_id": 9}}
        assert load(folder).eos_token_ids == {9}
    folder.config = {"eos_token_id": 7}
    assert load(folder).eos_token_ids == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert load(folder).eos_token_ids == {3, 4}
    for bad in ("-1", "true", '["a"]', "1.5"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(CheckpointError, match=r"^generation_config\.json: eos_token_id is "):
            load(folder)


def test_chat_template_places(tmp_path: Path) -> None:
    raw = byte_level_raw(bos=False)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load(write(tmp_path, raw)).chat_template is None
    with pytest.raises(TemplateError, match="no chat template"):
        load(Folder(tmp_path)).chat([{"role": "user", "content": "a"}])
    for place, content, expected in (
        ("tokenizer_config", {"chat_template": "A"}, "A"),
        ("tokenizer_config", {"chat_template": named}, "D"),
        ("chat_template", {"chat_template": "J"}, "J"),
    ):
        assert load(write(tmp_path, raw, **{place: content})).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("é{{ 1 }}")
    assert load(Folder(tmp_path)).chat_template == "é{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja: not UTF-8"):
        load(Folder(tmp_path))


def test_missing_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing$"):
        load(Folder(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=r"the tokenizer is in tokenizer\.model, supported: tokenizer\.json$"):
        load(Folder(tmp_path))


def corrupt() -> Iterator[bytes]:
    good = byte_level_raw(bos=True).to_str()
    yield from (b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"model": 3}', good[: len(good) // 2].encode())
    yield b"[" * 100_000
    for path, value in (
        (("model", "type"), "Nope"),
        (("model", "vocab"), {"a": -1}),
        (("model", "vocab"), {"a": 2**40}),
        (("model", "merges"), [["zz", "yy"]]),
        (("post_processor", "single"), [{"SpecialToken": {"id": "<none>", "type_id": 0}}]),
        (("pre_tokenizer", "type"), "Python"),
        (("decoder", "type"), "Python"),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ):
        tree = json.loads(good)
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        yield json.dumps(tree).encode()


@pytest.mark.parametrize("data", list(corrupt()), ids=lambda data: str(data[:12]))
def test_corrupt_tokenizer_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises((CheckpointError, UnsupportedModel), match=r"^tokenizer\.json: ") as caught:
        load(Folder(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"bos_token": "\ud800"},
        {"additional_special_tokens": [{"content": "a\udfff"}]},
        {"added_tokens_decoder": {"1" * 5000: "a"}},
        {"eos_token": {"content": 3}},
        {"eos_token": {"content": "a", "lstrip": "yes"}},
        {"added_tokens_decoder": {"x": "a"}},
        {"added_tokens_decoder": [1]},
        {"additional_special_tokens": "abc"},
        {"additional_special_tokens": [1]},
        {"chat_template": 7},
    ],
)
def test_corrupt_tokenizer_config(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json: "):
        load(write(tmp_path, byte_level_raw(bos=False), tokenizer_config=config))
