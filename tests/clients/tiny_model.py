"""A tiny random model with a long context: it answers thousands of tokens a second, and mostly ends by itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 16384
"""Tokens: room for whatever a generator of examples thinks of."""
VOCABULARY = 1000
HIDDEN, INNER, HEAD_DIM, HEADS = 32, 64, 16, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_WEIGHT = 4.0
"""How much larger than others the scores of the end are."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny_model(folder: Path) -> Path:
    """Writes the checkpoint; the same each time."""
    tokenizer = _tokenizer()
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "vocab_size": size,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(size), str(folder / "model.safetensors"), {"format": "pt"})
    return folder


def _tokenizer() -> Tokenizer:
    """Byte-level, with the words of this package's documents."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    docs = Path(__file__).parents[2] / "docs"
    found.train_from_iterator([path.read_text() for path in sorted(docs.glob("*.md"))], trainer)
    return found


def _weights(size: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    width = HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj": normal(width, HIDDEN),
        "self_attn.k_proj": normal(HEAD_DIM, HIDDEN),
        "self_attn.v_proj": normal(HEAD_DIM, HIDDEN),
        "self_attn.o_proj": normal(HIDDEN, width),
        "mlp.gate_proj": normal(INNER, HIDDEN),
        "mlp.up_proj": normal(INNER, HIDDEN),
        "mlp.down_proj": normal(HIDDEN, INNER),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.copy(),
    }
    found = {f"model.layers.0.{name}.weight": tensor for name, tensor in layer.items()}
    head = normal(size, HIDDEN)
    head[2] *= END_WEIGHT
    embedding = normal(size, HIDDEN)
    return found | {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.copy(), "lm_head.weight": head}
