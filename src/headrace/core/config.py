"""What a user may set. Flags of the command line are made from these fields and their docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BACKENDS = ("auto", "torch", "native")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
INSTRUCTION_SETS = ("auto", "avx512", "avx2", "portable")
QUANTS = ("auto", "none", "stored", "int8", "int4", "fp8")
KV_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "fp8")
PROMPT_FORMS = ("auto", "chatml", "mpt", "train", "cli", "raw")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; None means: chosen for this model and machine, with a reason (`core.resolve`)."""

    model: str
    """A Hugging Face-layout folder, a .gguf file, a Hub id (org/name or org/name@revision), or `demo`."""
    backend: str = "auto"
    """What executes the model: auto, torch or native."""
    device: str = "auto"
    """Where the torch backend runs: auto (on an NVIDIA GPU where it can), cpu or cuda. The native backend runs on the
    CPU."""
    dtype: str = "auto"
    """Type of plain weights, and on torch of all arithmetic: auto, float32, bfloat16 or float16. If set, packed weights
    are dequantised to it, but on CUDA only with a quant of none."""
    quant: str = "auto"
    """How weights are kept: auto, none (plain numbers), stored (as the checkpoint packs them), int8, int4 or fp8 (plain
    weights are rounded at load). All but none: CUDA, where int8 and fp8 round activations too, or (but for fp8) the
    native backend, with int8 activations."""
    kv_dtype: str = "auto"
    """Type of the KV cache: auto, float32, bfloat16, float16 (torch), int8 (native) or fp8 (CUDA)."""
    batch_invariant: bool = False
    """On CUDA: every answer's bits independent of the batch, at a cost; on a CPU they always are."""
    instruction_set: str = "auto"
    """Kernels of the native backend: auto (the fastest that this machine runs), avx512, avx2 or portable."""
    threads: int | None = None
    """CPU threads."""
    policy: str = "fused"
    """Who joins the running batch: fused (everyone, at the next iteration), serial, static:B or window:MS."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together."""
    max_num_seqs: int | None = None
    """Most requests in the running batch."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one iteration."""
    block_size: int = 16
    """Tokens in one block of the KV cache."""
    kv_cache_mib: int | None = None
    """Size of the KV cache in MiB."""
    prefix_cache: bool = True
    """Reuse the KV blocks of prompts that begin alike."""
    adapters: tuple[str, ...] | Mapping[str, str] = field(
        default=(), metadata={"flag": "adapter", "metavar": "NAME=FOLDER"}
    )
    """A LoRA adapter that requests may choose by NAME; FOLDER is as peft saves it."""
    prompt_form: str = "auto"
    """How a model that sees is told a conversation: auto (its chat template, else as its config says), chatml or mpt
    (NVLM-D, InternVL: with or without a newline after each turn), train, cli or raw (Open-Qwen2VL)."""
    max_images: int = 32
    """Most images of one request."""
    max_image_mib: int = 20
    """Most MiB of one image's file."""
    allow_image_urls: bool = False
    """Fetch images that requests name by http: and https: addresses; never from private networks."""
    image_folder: str = ""
    """Folder from which requests may name images by file: URLs; empty: none may."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The NVIDIA GPU that torch would use."""

    name: str
    """As its driver calls it."""
    total_bytes: int
    """Its memory."""
    free_bytes: int
    """What of it nobody holds."""
    capability: tuple[int, int]
    """Compute capability: (9, 0) is Hopper."""
    multiprocessors: int | None = None
    """None: not known before torch is imported."""
    count: int = 1
    """GPUs that this process may use, this one among them."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What `resolve` needs to know of the machine."""

    cores: int
    """CPUs this process may run on."""
    free_memory_bytes: int
    """Memory that can still be taken without swapping, in this process's control group."""
    backends: tuple[str, ...] = ("torch",)
    """Backends that are installed, the best on a CPU first."""
    gpu: Gpu | None = None
    """What device cuda would run on; None: there is none, or torch cannot use it."""
    no_gpu: str = "nobody has looked for a GPU"
    """Why `gpu` is None."""


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Every setting decided, each automatic one with its reason."""

    backend: str
    """What executes the model."""
    dtype: str
    """Type of plain weights, and on torch of all arithmetic."""
    quant: str
    """How weights are kept."""
    kv_dtype: str
    """Type of the KV cache."""
    instruction_set: str
    """Kernels of the native backend; auto: the fastest that this machine runs."""
    threads: int
    """CPU threads."""
    policy: str
    """Who joins the running batch."""
    block_size: int
    """Tokens in one block of the KV cache."""
    num_blocks: int
    """Blocks of the KV cache."""
    max_model_len: int
    """Most tokens of prompt and answer together."""
    max_num_seqs: int
    """Most requests in the running batch."""
    max_num_batched_tokens: int
    """Most tokens computed in one iteration."""
    prefix_cache: bool
    """Whether the KV blocks of prompts that begin alike are reused."""
    reasons: Mapping[str, str]
    """Field -> why it has its value."""
    device: str = "cpu"
    """Where the backend runs: cpu or cuda."""
    batch_invariant: bool = True
    """Whether every answer's bits are independent of the batch."""
