"""Every GGUF type, end to end: a file written by the `gguf` package against transformers on the dequantised weights.

With a float32 dtype the tokens are transformers' on both backends. As the native backend runs such a file if it is not
told how, with the weights as stored and int8 activations, the logits are near.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from headrace import LLM
from tests.e2e.stored import stored_is_near

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build(architecture: str, tied: bool, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(4)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes, tie_word_embeddings=tied))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES | sizes, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model.eval()


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        index, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{index}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k: halves become pairs."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write(path: Path, model: PreTrainedModel, architecture: str, *kinds: Type) -> None:
    """Writes the model, its matrices in `kinds` by turns, and gives it the weights that the file holds, dequantised by
    the gguf package."""
    writer = gguf.GGUFWriter(str(path), architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    tied = config.tie_word_embeddings
    for index, (name, weight) in enumerate(model.state_dict().items()):
        if tied and name.startswith("lm_head"):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        used = kinds[index % len(kinds)] if weight.ndim == 2 else Type.F32
        if used in BLOCKS:
            packed = random_blocks(tuple(weight.shape), used, index)
        else:
            packed = gguf.quants.quantize(weight.numpy(), used)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, used).astype(np.float32)))
        # Rows are packed one by one, so packed rows are put in the order of the file.
        stored = interleave(packed, heads) if architecture == "llama" and heads else packed
        writer.add_tensor(gguf_name(name), stored, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NEAR = 0.02
"""Nats. A wrong scale or nibble makes it 1 and more."""
NEAR_WIDE = 1.0
"""For weights of 0.3 in rows of 256: a model that shows a rounding a hundredfold (with int8 weights as well)."""
KINDS = (Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
# The K types, which the package reads but does not write: bytes a block, and where its float16 scales lie.
BLOCKS = {
    Type.Q2_K: (84, (80, 82)),
    Type.Q3_K: (110, (108,)),
    Type.Q4_K: (144, (0, 2)),
    Type.Q5_K: (176, (0, 2)),
    Type.Q6_K: (210, (208,)),
}
LEVELS = {Type.Q2_K: 1.5 * 8, Type.Q3_K: 2 * 16, Type.Q4_K: 8 * 32, Type.Q5_K: 16 * 32, Type.Q6_K: 16 * 64}
"""How far a weight of each type lies from zero, in scales."""


def random_blocks(shape: tuple[int, ...], kind: Type, seed: int) -> np.ndarray:
    """Random weights of about 0.3, packed: (rows, bytes)."""
    size, places = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    for place in places:
        scales = rng.uniform(0.2, 0.4, packed.shape[:2]) / LEVELS[kind]
        packed[..., place : place + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return packed.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen2", True)])
def test_tokens_of_a_gguf_file(architecture: str, tied: bool, kind: Type, tmp_path: Path) -> None:
    model = build(architecture, tied)
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        write(path, model, architecture, kind)
    compare(path, model)


@pytest.mark.parametrize("mixed", [[kind] for kind in BLOCKS] + [[Type.Q4_K, Type.Q6_K]], ids=lambda k: k[-1].name)
def test_tokens_of_k_types(mixed: list[Type], tmp_path: Path) -> None:
    """One type for every matrix, and two by turns, as Q4_K_M has them."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = build("llama", False, **sizes)
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        write(path, model, "llama", *mixed)
    compare(path, model)


def compare(path: Path, model: PreTrainedModel) -> None:
    prompts = [[5, 17, 3, 80, 41], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    for backend in ("native", "torch"):
        with LLM(str(path), backend=backend, dtype="float32", threads=1) as llm:
            answers = llm.generate(prompts, max_tokens=24)
        assert [list(answer.token_ids) for answer in answers] == expected, backend
    stored_is_near(path, model, NEAR if model.config.hidden_size == 64 else NEAR_WIDE)
