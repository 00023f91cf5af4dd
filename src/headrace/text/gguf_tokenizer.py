"""A tokenizer from GGUF metadata, built in memory: here byte-level BPE, `gguf_sentencepiece` has the other kinds.

A GGUF file holds the vocabulary and the merges, and only the *name* of the pre-tokenizer (`tokenizer.ggml.pre`); the
regular expressions behind the names are below. Sources: the tokenizer.json of the models the names stand for, and
llama.cpp's src/llama-vocab.cpp for the rule called `default`. Where the two differ, the model's own file holds: it is
what the model was trained with (qwen2 normalises to NFC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headrace.core.errors import UnsupportedModel, shorten
from headrace.text.gguf_metadata import CONTROL, UNKNOWN, USER_DEFINED, Metadata, NamedIds
from headrace.text.parts import TokenizerParts

SENTENCEPIECE_KINDS = frozenset(("llama", "t5"))
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


def build_gguf_tokenizer(metadata: Mapping[str, object], name: str) -> TokenizerParts:
    """The tokenizer that GGUF metadata describes; `name` is the file's, for messages.

    Raises UnsupportedModel on a tokenizer model or pre-tokenizer we do not know, CheckpointError on broken metadata.
    """
    read = Metadata(metadata, name)
    kind = read.text("tokenizer.ggml.model")
    if kind in SENTENCEPIECE_KINDS:
        from headrace.text.gguf_sentencepiece import build_sentencepiece

        return build_sentencepiece(read, kind)
    if kind != "gpt2":
        raise UnsupportedModel(
            f"{name}: tokenizer.ggml.model is {shorten(kind)}, supported: 'gpt2' (byte-level BPE), "
            "'llama' and 't5' (SentencePiece)"
        )
    pre_name = read.text("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        raise UnsupportedModel(
            f"{name}: tokenizer.ggml.pre is {shorten(pre_name)}, supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    tokens = read.tokens()
    types = read.token_types(len(tokens))
    raw = Tokenizer(_build_bpe(read, tokens, pre))
    _set_pipeline(raw, pre, read.flag("tokenizer.ggml.add_space_prefix", default=False))
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    raw.add_tokens(added)
    named = NamedIds.read(read, tokens, add_bos=pre.add_bos, add_eos=False)
    _set_bos_eos(raw, *(None if i is None else tokens[i] for i in (named.begin, named.end)))
    return TokenizerParts(
        raw=raw,
        eos_token_ids=named.eos_token_ids,
        bos_token_id=named.bos,
        special_tokens=named.special_tokens,
        chat_template=read.text("tokenizer.chat_template"),
    )


def _set_bos_eos(raw: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `encode(…, add_special_tokens=True)` begin with `bos` and end with `eos`, where given."""
    template = [token for token in (bos, "$A", eos) if token is not None]
    special = [(token, raw.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    # A list, not one string: a token may hold spaces or a colon, which the string form gives a meaning.
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _build_bpe(read: Metadata, tokens: list[str], pre: PreTokenizer) -> models.BPE:
    key = "tokenizer.ggml.merges"
    vocab = {token: i for i, token in enumerate(tokens)}
    # The library holds every merge against the vocabulary itself, in a quarter of the time that Python takes.
    merges = cast("list[tuple[str, str]]", [tuple(merge.split(" ", 1)) for merge in read.strings(key)])
    try:
        return models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception:  # nothing better: it names no merge
        for merge in read.strings(key):
            left, space, right = merge.partition(" ")
            if not (left and space and right):
                raise read.fail(key, merge, "two tokens with a space between") from None
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise read.fail(key, merge, "two tokens that together are a token") from None
        raise


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
