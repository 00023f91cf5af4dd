"""A byte-level BPE tokenizer from GGUF metadata, built in memory.

A GGUF file holds the vocabulary and the merges, and only the *name* of the pre-tokenizer (`tokenizer.ggml.pre`); the
regular expressions behind the names are below. Sources: the tokenizer.json of the models the names stand for, and
llama.cpp's src/llama-vocab.cpp for the rule called `default`. Where the two differ, the model's own file holds: it is
what the model was trained with (qwen2 normalises to NFC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is cut before the merges run."""

    patterns: tuple[str, ...]
    """Applied in turn; each match is a piece, and so is what lies between two matches."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole."""
    add_bos: bool = False
    """Whether the text begins with BOS where the file does not say."""
    nfc: bool = False
    """Whether the text is normalised to NFC first."""


_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_GPT2_ONLY = PreTokenizer((_GPT2,))
_LLAMA3_BOS = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_ONLY,
    "phi-2": _GPT2_ONLY,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "llama3": _LLAMA3_BOS,
    "llama-v3": _LLAMA3_BOS,
    "llama-bpe": _LLAMA3_BOS,
    "falcon3": _LLAMA3_BOS,
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "llama4": PreTokenizer((_GPT4O,)),
}
"""By `tokenizer.ggml.pre`. A file without the key gets `default`, as in llama.cpp."""

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TOKEN_TYPES = range(7)  # undefined, normal, unknown, control, user-defined, unused, byte
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NAMED: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a checkpoint says about its tokenizer."""

    raw: Tokenizer
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    special_tokens: Mapping[str, str]
    chat_template: str | None


class _Metadata:
    """Typed reads of the `tokenizer.*` keys; a wrong type raises CheckpointError naming file and key."""

    def __init__(self, metadata: Mapping[str, object], name: str) -> None:
        self.metadata = metadata
        self.name = name

    def fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {key} is {shorten(value)}, allowed: {allowed}")

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, value, "a list of strings")
        return value

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.fail(key, value, f"a token id from 0 to {vocab_size - 1}")
        return value

    def token_types(self, vocab_size: int) -> list[int]:
        """One a token; all normal where the key is missing."""
        key = "tokenizer.ggml.token_type"
        value = self.metadata.get(key)
        if value is None:
            return [1] * vocab_size
        types = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(types, list) or len(types) != vocab_size:
            raise self.fail(key, value, f"a list of {vocab_size} token types, one a token")
        for item in types:
            if not isinstance(item, int) or item not in _TOKEN_TYPES:
                raise self.fail(key, item, "0 to 6")
        return types


def build_gguf_tokenizer(metadata: Mapping[str, object], name: str) -> TokenizerParts:
    """The tokenizer that GGUF metadata describes; `name` is the file's, for messages.

    Raises UnsupportedModel on a tokenizer model or pre-tokenizer we do not know, CheckpointError on broken metadata.
    """
    read = _Metadata(metadata, name)
    kind = read.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(f"{name}: tokenizer.ggml.model is {shorten(kind)}, supported: 'gpt2' (byte-level BPE)")
    pre_name = read.text("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        raise UnsupportedModel(
            f"{name}: tokenizer.ggml.pre is {shorten(pre_name)}, supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(read.strings("tokenizer.ggml.tokens"))]
    if not tokens:
        raise read.fail("tokenizer.ggml.tokens", [], "at least one token")
    types = read.token_types(len(tokens))
    raw = Tokenizer(_build_bpe(read, tokens, pre))
    _set_pipeline(raw, pre, read.flag("tokenizer.ggml.add_space_prefix", default=False))
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    raw.add_tokens(added)

    ids = {key: read.token_id(f"tokenizer.ggml.{key}", len(tokens)) for key in (*_NAMED.values(), *_STOP_KEYS)}
    bos, eos = ids["bos_token_id"], ids["eos_token_id"]
    add_bos = read.flag("tokenizer.ggml.add_bos_token", default=pre.add_bos)
    add_eos = read.flag("tokenizer.ggml.add_eos_token", default=False)
    for wanted, token_id, what in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
        if wanted and token_id is None:
            raise CheckpointError(f"{name}: add_{what}_token is true, but tokenizer.ggml.{what}_token_id is missing")
    _set_bos_eos(
        raw, tokens[bos] if add_bos and bos is not None else None, tokens[eos] if add_eos and eos is not None else None
    )
    return TokenizerParts(
        raw=raw,
        eos_token_ids=frozenset(i for key in _STOP_KEYS if (i := ids[key]) is not None),
        bos_token_id=bos,
        special_tokens={what: tokens[i] for what, key in _NAMED.items() if (i := ids[key]) is not None},
        chat_template=read.text("tokenizer.chat_template"),
    )


def gguf_eos_ids(metadata: Mapping[str, object], name: str) -> frozenset[int]:
    """The ids that end an answer, of a file that need not have a tokenizer. Raises CheckpointError."""
    read = _Metadata(metadata, name)
    ids = (read.token_id(f"tokenizer.ggml.{key}", 2**31) for key in _STOP_KEYS)
    return frozenset(i for i in ids if i is not None)


def _set_bos_eos(raw: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `encode(…, add_special_tokens=True)` begin with `bos` and end with `eos`, where given."""
    template = [token for token in (bos, "$A", eos) if token is not None]
    special = [(token, raw.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    # A list, not one string: a token may hold spaces or a colon, which the string form gives a meaning.
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _build_bpe(read: _Metadata, tokens: list[str], pre: PreTokenizer) -> models.BPE:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise read.fail("tokenizer.ggml.tokens", twice, "each token once")
    merges: list[tuple[str, str]] = []
    for merge in read.strings("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise read.fail("tokenizer.ggml.merges", merge, "two tokens with a space between")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise read.fail("tokenizer.ggml.merges", merge, "two tokens that together are a token")
        merges.append((left, right))
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)


def _set_pipeline(raw: Tokenizer, pre: PreTokenizer, add_space_prefix: bool) -> None:
    steps: list[normalizers.Normalizer] = []
    if pre.nfc:
        steps.append(normalizers.NFC())
    if add_space_prefix:
        # Once a text, and only where none is: a ByteLevel prefix after a Split would come before every piece.
        steps += [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A  "), " ")]
    if steps:
        raw.normalizer = normalizers.Sequence(steps)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
