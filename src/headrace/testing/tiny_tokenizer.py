"""A tokenizer of a few hundred tokens, as the folders of Qwen's family hold theirs. Needs tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer cuts a text before it merges bytes."""
_CORPUS = (
    "<Image><tile_1><tile_2><tile_3><tile_global_thumbnail></Image>\n",
    "system\nYou are a helpful assistant. Follow the user's instruction and answer questions.\n",
    "user\nWhat is in the image? Explain why this picture is funny, and describe the left and the right one.\n",
    "assistant\n",
)
"""Merges are learnt across the borders of the tile tags, as in Qwen's vocabulary (`<Image`, `><`, `tile`)."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_tokenizer(path: Path, special: Sequence[str], chat_template: bool = True) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json: a byte-level BPE of 96 merges, and the tokens `special` with the
    next ids, in order. Returns the ids of those."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 96, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(_CORPUS * 4, trainer)
    first = raw.get_vocab_size()
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    path.mkdir(parents=True, exist_ok=True)
    raw.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {text: first + place for place, text in enumerate(special)}
