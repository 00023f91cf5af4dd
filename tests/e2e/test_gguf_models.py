"""Every GGUF type, end to end: a file written by the `gguf` package against transformers on the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from headrace import LLM

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


def build(architecture: str, tied: bool) -> PreTrainedModel:
    torch.manual_seed(4)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied))
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


def write(path: Path, model: PreTrainedModel, architecture: str, kind: Type) -> None:
    """Writes the model, and gives it the weights that the file holds, dequantised by the gguf package."""
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
    for name, weight in model.state_dict().items():
        if tied and name.startswith("lm_head"):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        used = kind if weight.ndim == 2 else Type.F32
        packed = gguf.quants.quantize(weight.numpy(), used)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, used).astype(np.float32)))
        stored = weight.numpy()
        if architecture == "llama" and heads:
            packed = gguf.quants.quantize(interleave(stored, heads), used)
            assert np.array_equal(gguf.quants.dequantize(packed, used), interleave(stored, heads))
        writer.add_tensor(gguf_name(name), packed, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0], ids=lambda k: k.name)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen2", True)])
def test_tokens_of_a_gguf_file(architecture: str, tied: bool, kind: Type, tmp_path: Path) -> None:
    model = build(architecture, tied)
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        write(path, model, architecture, kind)
    prompts = [[5, 17, 3, 80, 41], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
    with LLM(str(path), threads=1) as llm:
        answers = llm.generate(prompts, max_tokens=24)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert list(answer.token_ids) == out[0, len(prompt) :].tolist()
