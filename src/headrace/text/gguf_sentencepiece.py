"""SentencePiece tokenizers from GGUF metadata: the kinds `llama` (BPE by score) and `t5` (unigram).

`tokenizer.ggml.pre` has no meaning for them. The kind `llama` is written of models whose normaliser changes nothing but
spaces; where a file does carry `remove_extra_whitespaces` or `precompiled_charsmap`, they are honoured. What a file
leaves out is taken as llama.cpp does (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.core.errors import CheckpointError
from headrace.text.gguf_metadata import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Metadata, NamedIds
from headrace.text.literals import Literals
from headrace.text.parts import TokenizerParts
from headrace.text.sentencepiece import SentencePiece
from headrace.text.spm_models import BpeSegmenter, SpmVocabulary, UnigramSegmenter
from headrace.text.spm_normalizer import CharacterMap, SpmNormalizer

_BYTES: Mapping[str, int] = {f"<0x{byte:02X}>": byte for byte in range(256)}
_MAX_LENGTH = 2**10
"""Characters of a piece; SentencePiece trains at most 16."""


def build_sentencepiece(read: Metadata, kind: str) -> TokenizerParts:
    """Raises CheckpointError on broken metadata."""
    tokens = read.tokens()
    for token in tokens:
        if len(token) > _MAX_LENGTH:
            raise read.fail("tokenizer.ggml.tokens", token, f"pieces of at most {_MAX_LENGTH} characters")
    types = read.token_types(len(tokens))
    vocabulary = SpmVocabulary(
        tokens=tokens,
        scores=read.scores(len(tokens)),
        types=types,
        unknown_id=_unknown_id(read, types),
        byte_ids=_byte_ids(read, tokens, types),
    )
    if vocabulary.unknown_id is None and vocabulary.byte_ids is None:
        raise CheckpointError(f"{read.name}: tokenizer.ggml.token_type has neither an unknown token (2) nor bytes (6)")
    named = NamedIds.read(read, tokens, add_bos=None if kind == "llama" else False, add_eos=False)
    normalizer = SpmNormalizer(
        add_prefix=read.flag("tokenizer.ggml.add_space_prefix", default=True),
        collapse=read.flag("tokenizer.ggml.remove_extra_whitespaces", default=False),
        characters=_character_map(read),
        user_defined=Literals(vocabulary.ids(USER_DEFINED)),
    )
    raw = SentencePiece(
        vocabulary=vocabulary,
        normalizer=normalizer,
        segmenter=BpeSegmenter(vocabulary) if kind == "llama" else UnigramSegmenter(vocabulary),
        begin=() if named.begin is None else (named.begin,),
        end=() if named.end is None else (named.end,),
        strips_right=_strips_right(read, vocabulary),
    )
    return TokenizerParts(
        raw=raw,
        eos_token_ids=named.eos_token_ids,
        bos_token_id=named.bos,
        special_tokens=named.special_tokens,
        chat_template=read.text("tokenizer.chat_template"),
    )


def _unknown_id(read: Metadata, types: Sequence[int]) -> int | None:
    """What the file names, else the first token of that type."""
    named = read.token_id("tokenizer.ggml.unknown_token_id", len(types))
    if named is not None and types[named] == UNKNOWN:
        return named
    return types.index(UNKNOWN) if UNKNOWN in types else None


def _byte_ids(read: Metadata, tokens: Sequence[str], types: Sequence[int]) -> list[int] | None:
    """The tokens of type byte: all 256 or none."""
    found = {token: i for i, token in enumerate(tokens) if types[i] == BYTE}
    if not found:
        return None
    odd = next((token for token in found if token not in _BYTES), None)
    if odd is not None:
        raise read.fail("tokenizer.ggml.tokens", odd, "<0x00> to <0xFF> for a token of type byte (6)")
    missing = next((token for token in _BYTES if token not in found), None)
    if missing is not None:
        raise CheckpointError(f"{read.name}: tokenizer.ggml.tokens has {len(found)} byte tokens, {missing} is missing")
    return [found[token] for token in _BYTES]


def _character_map(read: Metadata) -> CharacterMap | None:
    key = "tokenizer.ggml.precompiled_charsmap"
    data = read.data(key)
    if not data:
        return None
    try:
        return CharacterMap(data)
    except ValueError as error:
        raise CheckpointError(f"{read.name}: {key} is {error}, allowed: an array and its strings") from None


def _strips_right(read: Metadata, vocabulary: SpmVocabulary) -> frozenset[str]:
    """Phi-3's special tokens take the white space after them: its tokenizer.json says so, a GGUF file cannot."""
    if read.metadata.get("general.architecture") != "phi3":
        return frozenset()
    return frozenset(vocabulary.ids(CONTROL)) - {"<s>", "<unk>", "<|endoftext|>"}
