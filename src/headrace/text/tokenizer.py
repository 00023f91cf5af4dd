"""Text to token ids and back, from a Hugging Face folder or a GGUF file. No code of the folder is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from headrace.core.errors import CheckpointError, RequestError, TemplateError, UnsupportedModel, shorten
from headrace.text.detokenize import DecoderRules, Detokenizer, read_decoder
from headrace.text.gguf_metadata import gguf_eos_ids
from headrace.text.gguf_tokenizer import build_gguf_tokenizer
from headrace.text.parts import TokenizerParts
from headrace.text.sentencepiece import SentencePiece
from headrace.weights.checkpoint import read_json
from headrace.weights.files import read_file

if TYPE_CHECKING:
    from headrace.text.chat import ChatTemplate
    from headrace.text.template_worker import TemplateRenderer
    from headrace.weights.checkpoint import Checkpoint

_MAX_TOKENIZER = 256 * 2**20
"""Bytes of a tokenizer.json; the largest in use (vocabularies of 256k) have about 35 MB."""
_MAX_TEMPLATE = 2**20
_TOKEN_ID = re.compile("[0-9]{1,9}")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_OTHER_NAMED = ("sep_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_OTHER_FORMATS = ("tokenizer.model", "spiece.model", "vocab.json", "tiktoken.model", "tekken.json")


class Tokenizer:
    """A model's tokenizer. Thread-safe: nothing changes after it is built, but a cache."""

    def __init__(self, parts: TokenizerParts, name: str) -> None:
        """`name` is the file's, for messages. Raises UnsupportedModel on a decoder we do not know."""
        self.raw = parts.raw
        self.vocab_size: int = parts.raw.get_vocab_size()
        """How many tokens there are, added ones too. The model may have more rows (padding)."""
        self.eos_token_ids = parts.eos_token_ids
        """Every id that ends an answer."""
        self.bos_token_id = parts.bos_token_id
        self.special_tokens = parts.special_tokens
        """bos_token, eos_token, pad_token, unk_token: the strings, for templates; those the model has."""
        self.chat_template = parts.chat_template
        if isinstance(parts.raw, SentencePiece):
            self.decoder_rules = DecoderRules("pieces", byte_fallback=True)
            self._special = parts.raw.special
        else:
            self.decoder_rules = read_decoder(parts.raw.decoder, name)
            added = parts.raw.get_added_tokens_decoder().values()
            self._special = frozenset(token.content for token in added if token.special)
        self._template: ChatTemplate | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens spelled in the text count as such. Raises RequestError on a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}"
            raise RequestError(f"text: {surrogate} is not valid Unicode") from None
        if isinstance(self.raw, SentencePiece):
            return self.raw.encode(text, add_special_tokens)
        try:
            ids: list[int] = self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a pattern that gives up raises Exception or PanicException, a BaseException
            raise RequestError(f"text: the tokenizer cannot read it: {shorten(str(error), 160)}") from None
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token are left out.

        Bytes that are no UTF-8 become U+FFFD. Where bytes are tokens (`<0xE2>`), only the bad ones do: the tokenizers
        library gives up the whole run, so that a character already shown to a reader could turn into U+FFFD.
        """
        if self.decoder_rules.byte_fallback or isinstance(self.raw, SentencePiece):
            detokenizer = Detokenizer(self, skip_special_tokens)
            return detokenizer.push(ids) + detokenizer.finish()
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def tokens(self, ids: Iterable[int], skip_special_tokens: bool = True) -> list[str]:
        """The tokens as the vocabulary spells them; ids without one are left out."""
        tokens = (self.raw.id_to_token(token_id) for token_id in ids)
        skipped = self._special if skip_special_tokens else frozenset[str]()
        return [token for token in tokens if token is not None and token not in skipped]

    def chat(self, messages: Sequence[Mapping[str, object]], /, **kwargs: Any) -> list[int]:
        """Token ids of a conversation: the template writes the special tokens. Arguments, and errors, of `render`."""
        return self.encode(self.render(messages, **kwargs), add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, object]], /, **kwargs: Any) -> str:
        """The prompt text of a conversation. Arguments of `ChatTemplate.render`.

        Raises InvalidParameter, TemplateError, EngineError.
        """
        if self.chat_template is None:
            raise TemplateError("the model has no chat template: give a prompt instead of messages")
        if self._template is None:
            from headrace.text.chat import ChatTemplate

            self._template = ChatTemplate(self.chat_template, self.special_tokens, self._renderer)
        return self._template.render(messages, **kwargs)

    @cached_property
    def _renderer(self) -> TemplateRenderer:
        from headrace.text.template_worker import TemplateRenderer

        return TemplateRenderer()

    def start(self) -> None:
        """Starts the process that renders chats, so that the first need not wait for it. Raises EngineError."""
        if self.chat_template is not None:
            self._renderer.start()

    def close(self) -> None:
        """Ends the process that renders chats, if there is one. Happens by itself when the tokenizer is dropped."""
        if "_renderer" in self.__dict__:
            self._renderer.close()


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError, UnsupportedModel."""
    name = checkpoint.path.name
    if checkpoint.format == "gguf":
        return Tokenizer(build_gguf_tokenizer(checkpoint.config, name), name)
    return Tokenizer(_read_folder(checkpoint.path, checkpoint.config), "tokenizer.json")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there is anything to load: a model without one still takes and gives token ids."""
    if checkpoint.format == "gguf":
        return "tokenizer.ggml.model" in checkpoint.config
    return any((checkpoint.path / name).is_file() for name in ("tokenizer.json", *_OTHER_FORMATS))


def declared_eos_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The end-of-sequence ids that a model says itself, without its tokenizer. Raises CheckpointError."""
    if checkpoint.format == "gguf":
        return gguf_eos_ids(checkpoint.config, checkpoint.path.name)
    return _declared_in_folder(checkpoint.path, checkpoint.config) or frozenset()


def _read_folder(folder: Path, config: Mapping[str, object]) -> TokenizerParts:
    raw = _read_raw(folder)
    settings = _optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        # As transformers: older folders keep the names in a file of their own, which then wins.
        settings = settings | _optional_json(folder / "special_tokens_map.json")
    named = {key: token for key in (*_NAMED, *_OTHER_NAMED) if (token := _token(settings.get(key), key)) is not None}
    _add_tokens(raw, settings, named)
    strings = {key: token.content for key, token in named.items()}
    # add_bos_token and add_eos_token are not read: beside a tokenizer.json, transformers drops them (its
    # post-processor says what is added).
    bos_token_id = raw.token_to_id(strings["bos_token"]) if "bos_token" in strings else None
    return TokenizerParts(
        raw=raw,
        eos_token_ids=_eos_ids(folder, config, raw, strings.get("eos_token")),
        bos_token_id=bos_token_id,
        special_tokens={key: strings[key] for key in _NAMED if key in strings},
        chat_template=_read_template(folder, settings),
    )


def _read_raw(folder: Path) -> RawTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [other for other in _OTHER_FORMATS if (folder / other).is_file()]
        if others:
            raise UnsupportedModel(f"{folder.name}: the tokenizer is in {', '.join(others)}, supported: tokenizer.json")
        raise CheckpointError(f"{folder.name}: tokenizer.json is missing")
    data = read_file(path, _MAX_TOKENIZER)
    try:
        raw = RawTokenizer.from_buffer(data)
        raw.encode("a")  # some faults (a post-processor naming no token) show only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and PanicException, a BaseException
        raise CheckpointError(f"tokenizer.json: {shorten(str(error), 160)}") from None
    # Training settings that do not belong to a prompt: transformers drops them too, unless asked.
    raw.no_truncation()
    raw.no_padding()
    return raw


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _token(value: object, key: str, special: bool = True) -> AddedToken | None:
    """A token of tokenizer_config.json: a string, or an object with `content` and flags."""
    if value is None:
        return None
    if _is_unicode(value):
        return AddedToken(value, special=special, normalized=False)
    if isinstance(value, dict) and _is_unicode(value.get("content")):
        flags = {flag: value.get(flag, False) for flag in ("lstrip", "rstrip", "single_word")}
        flags["normalized"] = value.get("normalized", not special)
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(value["content"], special=special or value.get("special") is True, **flags)
    raise CheckpointError(f"tokenizer_config.json: {key} is {shorten(value)}, allowed: a string or a token object")


def _is_unicode(value: object) -> TypeGuard[str]:
    """A string without lone surrogates (JSON can spell them, the tokenizers library raises on them)."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _add_tokens(raw: RawTokenizer, settings: Mapping[str, object], named: Mapping[str, AddedToken]) -> None:
    """Adds what tokenizer.json lacks, and marks the named tokens as special, as transformers does."""
    present = {token.content for token in raw.get_added_tokens_decoder().values()}
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(_TOKEN_ID.fullmatch(key) for key in added):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not an object of token ids")
    for key in sorted(added, key=int):
        token = _token(added[key], f"added_tokens_decoder.{key}", special=False)
        if token is not None and token.content not in present:
            raw.add_tokens([token])
            if raw.token_to_id(token.content) != int(key):
                raise CheckpointError(
                    f"tokenizer_config.json: added_tokens_decoder.{key} is {shorten(token.content)}, "
                    f"but tokenizer.json makes it token {raw.token_to_id(token.content)}"
                )
    present = {token.content for token in raw.get_added_tokens_decoder().values() if token.special}
    extra = [token for key in _EXTRA for token in _extra_tokens(settings.get(key), key)]
    missing = [token for token in (*named.values(), *extra) if token.content not in present]
    raw.add_special_tokens(missing)


def _extra_tokens(value: object, key: str) -> Iterator[AddedToken]:
    """A list of tokens, or an object of them by name."""
    values = list(value.values()) if isinstance(value, dict) else value
    if values is not None and not isinstance(values, list):
        raise CheckpointError(f"tokenizer_config.json: {key} is {shorten(value)}, allowed: a list of tokens")
    for item in values or ():
        if (token := _token(item, key)) is not None:
            yield token


def _eos_ids(folder: Path, config: Mapping[str, object], raw: RawTokenizer, eos_token: str | None) -> frozenset[int]:
    """What the model declares, else the tokenizer's eos_token."""
    declared = _declared_in_folder(folder, config)
    if declared is not None:
        return declared
    eos_id = raw.token_to_id(eos_token) if eos_token is not None else None
    return frozenset() if eos_id is None else frozenset((eos_id,))


def _declared_in_folder(folder: Path, config: Mapping[str, object]) -> frozenset[int] | None:
    """From generation_config.json, else config.json (or its part on the decoder); None where none of them says."""
    sources = [("generation_config.json", _optional_json(folder / "generation_config.json")), ("config.json", config)]
    for key in ("text_config", "llm_config"):
        if isinstance(part := config.get(key), dict):
            sources.append((f"config.json: {key}", part))
    for name, source in sources:
        value = source.get("eos_token_id")
        if value is None or value == []:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
            raise CheckpointError(f"{name}: eos_token_id is {shorten(value)}, allowed: a token id or a list of them")
        return frozenset(ids)
    return None


def _read_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json; of several named ones, `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_file(path, _MAX_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path.name}: not UTF-8 at byte {error.start}") from None
    name = "chat_template.json"
    template = _optional_json(folder / name).get("chat_template")
    if template is None:
        name = "tokenizer_config.json"
        template = settings.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{name}: chat_template is {shorten(template)}, allowed: a string or a list of named ones"
        )
    return template
