"""Stage vlm72b: NVLM-D-72B's shape (InternViT-6B before Qwen2-72B) on one card, weights packed as published checkpoints
are, and the study's four text questions (Open Hackathon, December 2024).

The study's times were on six A100 of 40 GB, and it does not say how many tokens its answers have: 512 each here, 2,048
in all, near the most (2,231) that its first time leaves room for. No tokenizer is needed: a prompt has a random id for
each four characters of its question, and 20 for the chat template's frame.
"""

from __future__ import annotations

from statistics import median

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.engine import Config, Engine, Model, prompts
from benchmarks.gpu_check.rows import Case, Figure

from headrace.compare.questions import TEXT4
from headrace.models.registry import describe

ANSWER = 512
FRAME = 20
STUDY = {"one at a time": 187.80, "all at once": 56.76, "vLLM": 5.05}
"""Seconds of the study, with flash attention: its benchmark, its batch, and vLLM (precision and GPUs not stated)."""

QWEN2_72B: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "llama",
    "attention_bias": True,
    "mlp_bias": False,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
INTERN_VIT_6B: Config = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "rms_norm",
    "qk_normalization": True,
    "qkv_bias": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "initializer_factor": 0.1,
}
"""As published (nvidia/NVLM-D-72B, config.json)."""
STORED_HEADS, REAL_HEADS = 32, 25
PAD_ID = 151_655
TINY = (
    {
        **QWEN2_72B,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 256,
    },
    {
        **INTERN_VIT_6B,
        "hidden_size": 100,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "image_size": 28,
    },
)


def nvlm(dry: bool, form: str) -> Model:
    """NVLM-D-72B's shape, or a tiny one."""
    llm, tower = TINY if dry else (QWEN2_72B, INTERN_VIT_6B)
    config = {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": tower["image_size"],
        "select_layer": -1,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "ps_version": "v2",
        "template": "chatml",
        "torch_dtype": "bfloat16",
        "llm_config": llm,
        "vision_config": tower,
    }
    width = int(str(tower["hidden_size"]))
    stored = STORED_HEADS * (width // REAL_HEADS)
    shapes = {
        "vision_model.encoder.layers.0.attn.qkv.weight": (3 * stored, width),
        "language_model.lm_head.weight": (int(str(llm["vocab_size"])), int(str(llm["hidden_size"]))),
    }
    found = describe(config, "hf", shapes, token_id=lambda text: 100 if dry else PAD_ID)
    return Model(found.spec, found.weight_map, form)


def cases(bench: Bench) -> list[Case]:
    found = []
    for form, load_s in (("int4", 45), ("fp8", 70)):
        found += [
            _case(bench, form, "all at once", load_s + 20),
            _case(bench, form, "one at a time", 60),
        ]
    return found


def _case(bench: Bench, form: str, way: str, needs_s: float) -> Case:
    return Case(
        f"text4, {'W4A16' if form == 'int4' else 'FP8'}, {way}",
        f"four questions, {ANSWER} tokens each; the study: {STUDY['one at a time']} s one at a time, "
        f"{STUDY['all at once']} s as a batch, {STUDY['vLLM']} s with vLLM; bound: bytes ÷ read bandwidth",
        lambda: _figure(bench, form, way),
        None,
        needs_s,
    )


def _figure(bench: Bench, form: str, way: str) -> Figure:
    running = _engine(bench, form)
    answer = 4 if bench.dry else ANSWER
    asked = questions(running.model.spec.vocab_size, bench.seed, bench.dry)
    running.run(asked, [3] * len(asked))
    if way == "all at once":
        rounds = 1 if bench.dry or bench.report.left_s() < 60 else 2
        seconds = [running.run(asked, [answer] * len(asked)).seconds for _ in range(rounds)]
        steps = answer
    else:
        seconds = [sum(running.run([one], [answer]).seconds for one in asked)]
        steps = answer * len(asked)
    model, tokens = running.model, answer * len(asked)
    kept = sum(len(one) + answer / 2 for one in asked) * answer * model.kv_bytes
    bound_s = (steps * model.read_bytes + kept) / bench.read_Bps
    ours = median(seconds)
    ratios = {name: round(theirs / ours, 2) for name, theirs in STUDY.items()}
    return Figure(
        seconds,
        "s",
        bound_s,
        bound_s / ours,
        f"{tokens / ours:.1f} tokens/s ({tokens} tokens); the study's times ÷ ours: "
        + ", ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        + f"; loaded in {running.load_s:.0f} s",
        {"tokens_per_s": tokens / ours, "study_over_ours": ratios, "memory": dict(running.backend.memory())},
    )


def _engine(bench: Bench, form: str) -> Engine:
    longest = 96 if bench.dry else 1024
    tokens = 128 if bench.dry else 2048

    def make() -> Engine:
        return Engine(nvlm(bench.dry, form), bench.dry, rows=4, tokens=tokens, longest=longest, seed=bench.seed)

    return bench.engine(form, make)


def questions(vocab_size: int, seed: int, dry: bool) -> list[list[int]]:
    """Token ids in place of the study's questions, as many as they have."""
    lengths = [FRAME + len(one.text) // (40 if dry else 4) for one in TEXT4]
    (ids,) = prompts(1, sum(lengths), vocab_size if dry else 150_000, seed)
    return [[ids.pop() for _ in range(length)] for length in lengths]
