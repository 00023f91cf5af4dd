"""Makes the files of a model that a peer reads, from another kind of file.

    PYTHON -I convert.py hf          MODEL.gguf  FOLDER            dequantised, float32, with its tokenizer
    PYTHON -I convert.py gguf        MODEL.gguf  FILE.gguf  TYPE   q4_0, q4_1, q8_0, f16 or f32; requantised if need be
    PYTHON -I convert.py ctranslate2 HF_FOLDER   FOLDER     TYPE   int8_float32 or float32
    PYTHON -I convert.py openvino    HF_FOLDER   FOLDER     TYPE   fp32, int8 or int4
    PYTHON -I convert.py onnxruntime HF_FOLDER   FOLDER     TYPE   int4 or fp32
    PYTHON -I convert.py random      MODEL.gguf  FILE.gguf  SHAPE  random float16 weights, with MODEL's tokenizer

A standalone script: PYTHON is the interpreter of an environment that has what the command imports. A converted folder
gets a file `headrace-peer.json` with the bytes of weights that one step of one row reads.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTS = "headrace-peer.json"
SHAPES = (
    ("llama-0.5b", {"layers": 30, "hidden": 1024, "ffn": 4096, "heads": 16, "kv_heads": 4}),
    ("llama-1.1b", {"layers": 22, "hidden": 2048, "ffn": 5632, "heads": 32, "kv_heads": 4}),
)
"""Llama-shaped, 64 values a head, head and embedding tied, the demo model's vocabulary."""
CONTEXT = 8192
GGUF_TYPES = (("f32", 0), ("f16", 1), ("q4_0", 2), ("q4_1", 3), ("q8_0", 7))
"""Name and number of llama.cpp's file types (enum llama_ftype)."""
OPENVINO_FLAGS = (
    ("fp32", ()),
    ("int8", ()),
    ("int4", ("--sym", "--group-size", "64", "--ratio", "1.0")),
)


def to_hf(source: Path, target: Path, _: str) -> None:
    """`save_pretrained` refuses a model that was loaded from GGUF; a fresh one with its weights it saves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM
    fresh = auto.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


def to_gguf(source: Path, target: Path, kind: str) -> None:
    import llama_cpp  # type: ignore[import, unused-ignore]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = dict(GGUF_TYPES)[kind]
    params.allow_requantize = True
    params.nthread = 1
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


def to_ctranslate2(source: Path, target: Path, kind: str) -> None:
    from ctranslate2.converters import TransformersConverter  # type: ignore[import, unused-ignore]

    TransformersConverter(str(source)).convert(str(target), quantization=kind)
    write_facts(target, (target / "model.bin").stat().st_size)


def to_openvino(source: Path, target: Path, kind: str) -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "-m", str(source)]
    command += ["--task", "text-generation-with-past", "--weight-format", kind, *dict(OPENVINO_FLAGS)[kind]]
    subprocess.run([*command, str(target)], check=True)
    write_facts(target, (target / "openvino_model.bin").stat().st_size)


def to_onnxruntime(source: Path, target: Path, kind: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
        subprocess.run([*command, "-p", kind, "-e", "cpu", "-c", cache], check=True)
    import onnx  # type: ignore[import, unused-ignore]

    model = onnx.load(str(target / "model.onnx"), load_external_data=False)
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    used = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    sizes = {one.name: external_bytes(one) for one in model.graph.initializer}
    write_facts(target, sum(size for name, size in sizes.items() if name not in gathered or name in used))


def to_random(tokenizer: Path, target: Path, shape: str) -> None:
    """Normal weights of standard deviation 0.02, norms of one, from a fixed seed."""
    import gguf
    import numpy as np

    size = dict(SHAPES)[shape]
    hidden, ffn, kv = size["hidden"], size["ffn"], size["kv_heads"] * 64
    writer = gguf.GGUFWriter(str(target), "llama")
    reader = gguf.GGUFReader(str(tokenizer))
    for name, one in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = one.types[0]
            writer.add_key_value(name, one.contents(), kind, one.types[-1] if len(one.types) > 1 else None)
    vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_name(shape)
    writer.add_block_count(size["layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, values.astype(np.float16))

    add("token_embd.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(size["layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", ffn, hidden),
            ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def external_bytes(tensor: Any) -> int:
    """Bytes of an onnx.TensorProto, in its own file or inside the model."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["length"]) if "length" in entries else int(tensor.ByteSize())


def write_facts(folder: Path, weights_bytes: int) -> None:
    (folder / FACTS).write_text(json.dumps({"weights_bytes": weights_bytes}), encoding="utf-8")


def main(command: str, source: str, target: str, kind: str = "") -> None:
    steps: dict[str, Callable[[Path, Path, str], None]] = {
        "hf": to_hf,
        "gguf": to_gguf,
        "ctranslate2": to_ctranslate2,
        "openvino": to_openvino,
        "onnxruntime": to_onnxruntime,
        "random": to_random,
    }
    made = Path(target)
    unfinished = made.with_name(made.name + ".unfinished")
    steps[command](Path(source), unfinished, kind)
    unfinished.rename(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
