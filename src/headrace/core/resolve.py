"""Every automatic choice, in one pure function, each with its reason (docs/CONTRACTS.md §1, defaults)."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.adapters import parse_adapters
from headrace.core.config import (
    BACKENDS,
    DEVICES,
    DTYPES,
    INSTRUCTION_SETS,
    KV_DTYPES,
    PROMPT_FORMS,
    QUANTS,
    EngineConfig,
    Gpu,
    Hardware,
    ResolvedConfig,
)
from headrace.core.errors import BackendUnavailable, ConfigError, InvalidParameter, OutOfMemory
from headrace.core.resolve_cuda import (
    CUDA_MAX_BATCHED_TOKENS,
    CUDA_MAX_NUM_SEQS,
    OLDEST_CARD,
    card_text,
    cuda_batch_invariant,
    cuda_blocks,
    cuda_dtype,
    cuda_kv_dtype,
    cuda_quant,
)
from headrace.core.sizing import CardUse, Stored, blocks_for, kv_bytes_per_block
from headrace.core.spec import ModelSpec

CPU_MAX_NUM_SEQS = 32
CPU_MAX_BATCHED_TOKENS = 512
CPU_KV_SHARE = 0.25
NATIVE_LANES = 16
"""What the native backend pads blocks and heads to."""
MIB = 2**20


INSTALL: Mapping[str, str] = {
    "native": "install a C++20 compiler, such as g++ 12, and then headrace again (pip install --no-cache-dir "
    "--force-reinstall --no-deps headrace, or make in its source tree)",
    "torch": "pip install 'headrace[torch]'",
}
"""Backend -> how to get what it needs."""
WEIGHTS: Mapping[str, str] = {
    "stored": "weights as stored",
    "int8": "weights rounded to int8",
    "int4": "weights rounded to int4",
    "fp8": "weights rounded to fp8",
}


def check_config(config: EngineConfig) -> None:
    """Refuses values that are wrong whatever the model. Raises InvalidParameter."""
    choices = {
        "backend": BACKENDS,
        "device": DEVICES,
        "dtype": DTYPES,
        "quant": QUANTS,
        "kv_dtype": KV_DTYPES,
        "instruction_set": INSTRUCTION_SETS,
        "prompt_form": PROMPT_FORMS,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InvalidParameter(name, getattr(config, name), ", ".join(allowed))
    limits = {
        "threads": (config.threads, 1, 1024),
        "max_model_len": (config.max_model_len, 2, 2**31),
        "max_num_seqs": (config.max_num_seqs, 1, 4096),
        "max_num_batched_tokens": (config.max_num_batched_tokens, 1, 2**20),
        "block_size": (config.block_size, 1, 256),
        "kv_cache_mib": (config.kv_cache_mib, 1, 2**24),
        "max_images": (config.max_images, 1, 1024),
        "max_image_mib": (config.max_image_mib, 1, 1024),
    }
    for name, (value, low, high) in limits.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidParameter(name, value, f"an integer from {low} to {high}")
    for name in ("prefix_cache", "allow_image_urls", "batch_invariant"):
        if not isinstance(getattr(config, name), bool):
            raise InvalidParameter(name, getattr(config, name), "true or false")
    if not isinstance(config.image_folder, str) or "\0" in config.image_folder:
        raise InvalidParameter("image_folder", config.image_folder, "the path of a folder")
    parse_adapters(config.adapters)


def resolve(config: EngineConfig, spec: ModelSpec, hardware: Hardware, stored: Stored | None = None) -> ResolvedConfig:
    """Decides what the user left open. `stored`: what the checkpoint holds; None: plain numbers of an unknown type.

    Raises ConfigError, InvalidParameter, OutOfMemory or BackendUnavailable.
    """
    check_config(config)
    stored = stored or Stored()
    reasons: dict[str, str] = {}

    def choose(name: str, given: int | str | None, value: int | str, reason: str) -> None:
        reasons[name] = "as set" if given is not None else f"{value}: {reason}"

    def choose_named(name: str, value: str, reason: str) -> str:
        choose(name, None if getattr(config, name) == "auto" else value, value, reason)
        return value

    device = choose_named("device", *choose_device(config, hardware))
    gpu = hardware.gpu if device == "cuda" else None
    backend = choose_named("backend", *choose_backend(config, hardware, spec.vision is not None))
    dtype = choose_named("dtype", *_dtype(config, backend, gpu, stored))
    quant = choose_named("quant", *_quant(config, spec, backend, gpu, stored))
    codes = quant in ("int8", "int4") or (quant == "stored" and stored.packed)
    kv_dtype = choose_named("kv_dtype", *_kv_dtype(config, backend, gpu, dtype, codes))
    invariant, why = ("True", "always so on a CPU") if gpu is None else cuda_batch_invariant(config)
    choose("batch_invariant", 1 if config.batch_invariant else None, invariant, why)
    threads = config.threads or hardware.cores
    choose("threads", config.threads, threads, "one per CPU that this process may use, and is given the time of")

    if config.max_model_len is not None and config.max_model_len > spec.context:
        raise ConfigError(f"max_model_len: got {config.max_model_len}, allowed: up to the model's {spec.context}")
    seqs, batched = _batch_limits(config, device)
    where = "on a CPU" if gpu is None else "on CUDA"
    choose("max_num_seqs", config.max_num_seqs, seqs, f"the default {where}, at least a static batch's size")
    choose("max_num_batched_tokens", config.max_num_batched_tokens, batched, f"the default {where}, ≥ max_num_seqs")

    wanted_len = config.max_model_len or spec.context
    use = CardUse(dtype, quant, kv_dtype, config.block_size, seqs, batched, wanted_len, config.batch_invariant)
    if gpu is None:
        num_blocks, why = _cpu_blocks(config, spec, hardware, backend, use)
    else:
        num_blocks, why = cuda_blocks(config, spec, gpu, use, stored)
    choose("num_blocks", None, num_blocks, why)
    max_model_len = min(wanted_len, num_blocks * config.block_size)
    cut = "the model's context" if max_model_len == spec.context else "what fits the KV cache"
    choose("max_model_len", config.max_model_len, max_model_len, cut)
    return ResolvedConfig(
        backend=backend,
        dtype=dtype,
        quant=quant,
        kv_dtype=kv_dtype,
        instruction_set=config.instruction_set,
        threads=threads,
        policy=config.policy,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        prefix_cache=config.prefix_cache,
        reasons=reasons,
        device=device,
        batch_invariant=invariant == "True",
    )


def choose_device(config: EngineConfig, hardware: Hardware) -> tuple[str, str]:
    """(cpu or cuda, why). Raises ConfigError for cuda with the native backend, BackendUnavailable if it cannot be."""
    gpu, missing = hardware.gpu, hardware.no_gpu
    if "torch" not in hardware.backends:
        gpu, missing = None, f"the backend torch is not installed: {INSTALL['torch']}"
    if gpu is not None and gpu.capability < OLDEST_CARD:
        missing = f"{card_text(gpu)} is too old: {OLDEST_CARD[0]}.{OLDEST_CARD[1]} is needed"
        gpu = None
    if config.device == "cuda":
        if config.backend == "native":
            raise ConfigError("device: got 'cuda', allowed with the native backend: auto, cpu")
        if gpu is None:
            raise BackendUnavailable(f"device: cuda cannot be used: {missing}")
        return "cuda", ""
    if config.backend == "native":
        return "cpu", "where the native backend runs"
    if config.device == "cpu" or gpu is None:
        return "cpu", missing
    return "cuda", card_text(gpu)


def choose_backend(config: EngineConfig, hardware: Hardware, sees: bool = False) -> tuple[str, str]:
    """(backend, why). `sees`: the model reads images. Raises ConfigError, or BackendUnavailable saying what to get."""
    installed = hardware.backends
    if sees and config.backend == "native":
        raise ConfigError("backend: got 'native', allowed for a model that reads images: auto, torch")
    if config.backend == "auto" and choose_device(config, hardware)[0] == "cuda":
        return "torch", "the one that runs on a GPU"
    if sees and config.backend == "auto":
        if "torch" not in installed:
            raise BackendUnavailable(f"this model reads images, which needs the backend torch: {INSTALL['torch']}")
        return "torch", "the one that reads images"
    if config.backend != "auto":
        if config.backend not in installed:
            raise BackendUnavailable(f"backend: {config.backend} is not installed: {INSTALL[config.backend]}")
        return config.backend, ""
    if not installed:
        ways = "; or for torch: ".join((INSTALL["native"], INSTALL["torch"]))
        raise BackendUnavailable(f"no backend is installed. For the native kernels: {ways}")
    if installed[0] == "native":
        if config.kv_dtype == "float16" and "torch" in installed:
            return "torch", "it has a KV cache of float16"
        return "native", "the fastest on a CPU"
    return installed[0], "the native kernels are not installed"


_DTYPE_REASON: Mapping[str, str] = {
    "native": "of arithmetic; weights are kept as quant says",
    "torch": "16-bit arithmetic is slower on most CPUs",
}


def _dtype(config: EngineConfig, backend: str, gpu: Gpu | None, stored: Stored) -> tuple[str, str]:
    """(dtype, why)"""
    if gpu is not None:
        return cuda_dtype(config, gpu, stored)
    return "float32" if config.dtype == "auto" else config.dtype, _DTYPE_REASON[backend]


def _quant(config: EngineConfig, spec: ModelSpec, backend: str, gpu: Gpu | None, stored: Stored) -> tuple[str, str]:
    """(quant, why)"""
    if gpu is not None:
        return cuda_quant(config, spec, gpu, stored)
    if config.quant != "auto":
        if backend != "native" and config.quant != "none":
            raise InvalidParameter("quant", config.quant, f"auto or none on the {backend} backend on a CPU")
        if config.quant == "fp8":
            raise InvalidParameter("quant", config.quant, "auto, none, stored, int8, int4 on the native backend")
        return config.quant, ""
    if backend != "native":
        return "none", f"the {backend} backend computes with plain numbers"
    if config.dtype != "auto":
        return "none", "a dtype is set"
    return "stored", "the fewest bytes, without a rounding of weights"


def _kv_dtype(config: EngineConfig, backend: str, gpu: Gpu | None, dtype: str, codes: bool) -> tuple[str, str]:
    """(kv_dtype, why). `codes`: weights are codes, and so on a CPU activations int8."""
    if gpu is not None:
        return cuda_kv_dtype(config, gpu, dtype)
    allowed = ("float32", "bfloat16", "int8") if backend == "native" else (dtype,)
    if config.kv_dtype != "auto":
        if config.kv_dtype not in allowed:
            raise InvalidParameter("kv_dtype", config.kv_dtype, f"auto, {', '.join(allowed)} on the {backend} backend")
        return config.kv_dtype, ""
    if codes:
        return "bfloat16", "half the bytes; int8 activations round far more"
    return (dtype, "as dtype") if dtype in allowed else ("float32", f"no {dtype} on the {backend} backend")


def _batch_limits(config: EngineConfig, device: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens). Every running row must be sure of one token a step."""
    most_seqs, most_tokens = CPU_MAX_NUM_SEQS, CPU_MAX_BATCHED_TOKENS
    if device == "cuda":
        most_seqs, most_tokens = CUDA_MAX_NUM_SEQS, CUDA_MAX_BATCHED_TOKENS
    kind, _, number = config.policy.partition(":")
    static = int(number) if kind == "static" and number.isdecimal() else 1
    seqs = config.max_num_seqs or max(most_seqs, static)
    if static > seqs:
        raise ConfigError(f"policy: {config.policy} needs max_num_seqs ≥ {static}, got {seqs}")
    batched = config.max_num_batched_tokens or max(most_tokens, seqs)
    if batched < seqs:
        raise ConfigError(f"max_num_batched_tokens: got {batched}, allowed: ≥ max_num_seqs ({seqs})")
    return seqs, batched


def _cpu_blocks(
    config: EngineConfig, spec: ModelSpec, hardware: Hardware, backend: str, use: CardUse
) -> tuple[int, str]:
    """(blocks of the KV cache, why so many). Raises OutOfMemory."""
    lanes = NATIVE_LANES if backend == "native" else 1
    block_bytes = kv_bytes_per_block(spec, use.kv_dtype, config.block_size, lanes)
    wanted = use.max_num_seqs * blocks_for(use.max_model_len, config.block_size)
    if config.kv_cache_mib is not None:
        affordable, why = config.kv_cache_mib * MIB // block_bytes, "what kv_cache_mib holds"
    else:
        affordable = int(hardware.free_memory_bytes * CPU_KV_SHARE) // block_bytes
        why = f"{CPU_KV_SHARE:.0%} of free memory"
    num_blocks = min(wanted, affordable)
    if num_blocks == wanted:
        why = f"enough for {use.max_num_seqs} requests of {use.max_model_len} tokens"
    tokens = config.max_model_len or 2
    if num_blocks * config.block_size < tokens:
        needed_mib = blocks_for(tokens, config.block_size) * block_bytes / MIB
        raise OutOfMemory(
            f"the KV cache can have {affordable * block_bytes / MIB:.1f} MiB, but one request of {tokens} tokens "
            f"needs {needed_mib:.1f} MiB: lower max_model_len or raise kv_cache_mib"
        )
    return num_blocks, why


def precision_text(config: ResolvedConfig) -> str:
    """How weights and KV cache are kept, for a reader."""
    weights = WEIGHTS.get(config.quant, config.dtype)
    return weights if config.kv_dtype == weights else f"{weights}, {config.kv_dtype} KV cache"
