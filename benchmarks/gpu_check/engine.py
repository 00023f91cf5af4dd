"""The engine on random weights of a true shape, without a checkpoint and without a tokenizer.

Every plane of every weight is a view of one random buffer, each at a place of its own: 140 GB of weights pass through
the loader from a few GB of numbers. Two formats hold packed weights as published checkpoints do: fp8 (E4M3, a float32
scale a row) and int4 (groups of 128 columns, a float16 scale each); `core.sizing` has the bytes of both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.backends.base import Backend, BackendOptions
from headrace.core.sizing import end_weights, kv_bytes_per_token, weight_bytes
from headrace.core.spec import ModelSpec, WeightMap
from headrace.core.types import EngineLimits, ErrorEvent, FinishEvent, Request, SamplingParams, TokenEvent
from headrace.engine.core import EngineCore
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.weights.qtensor import QTensor

Config = Mapping[str, object]
Plane = TypeVar("Plane", np.uint8, np.uint16)

SIGMA = 0.02
"""Standard deviation of the weights."""
GROUP = 128
PERIOD = 2**22 - 3
"""Random numbers that are made; the buffer repeats them. No power of two: no two rows of a matrix are the same."""
_INT4 = 4.6
"""Standard deviation of sixteen equally likely codes."""
_E4M3 = 0.6
"""And of the codes that `Buffer.e4m3` gives."""
LINEARS = frozenset({"q", "k", "v", "o", "gate", "up", "down"})

LLAMA2_7B: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TINY_LLAMA: Config = {
    **LLAMA2_7B,
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""In dry runs. Its rows are whole groups of 128."""


@dataclass(frozen=True, slots=True)
class Model:
    """A description, and the form of its decoder's linear weights: bf16, fp8 or int4."""

    spec: ModelSpec
    weight_map: WeightMap
    form: str = "bf16"

    @property
    def read_bytes(self) -> int:
        """Of weights that a step reads whatever it computes: all but the embedding's table and the vision side."""
        table = next(iter(end_weights(self.spec))).nbytes("bf16")
        return weight_bytes(replace(self.spec, vision=None), self.form) - (0 if self.spec.embedding.tied else table)

    @property
    def kv_bytes(self) -> int:
        """Of one token, in 16 bits."""
        return kv_bytes_per_token(self.spec, "bfloat16")

    def prefill_flops(self, prompts: int, tokens: int) -> float:
        """Of `prompts` prompts: products with weights for every token, logits for the last of each, and attention over
        what each token sees: 2 × 2 × head dim × heads × (tokens + 1) ÷ 2 a token and layer."""
        hidden, per_token = self.spec.hidden_size, 0.0
        for layer in self.spec.layers:
            a, inner = layer.attention, layer.mlp.intermediate
            per_token += 2 * hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
            per_token += 2 * hidden * inner * (3 if layer.mlp.gated else 2)
            per_token += 2 * a.head_dim * a.heads * (tokens + 1)
        return prompts * (tokens * per_token + 2 * hidden * self.spec.vocab_size)


def llama(dry: bool, form: str = "bf16") -> Model:
    """Llama-2-7B's shape, or a tiny one."""
    found = describe(TINY_LLAMA if dry else LLAMA2_7B, "hf", {})
    return Model(found.spec, found.weight_map, form)


# ---------------------------------------------------------------- weights


class Buffer:
    """Random numbers in the types of all planes; each is made when first asked for."""

    def __init__(self, numbers: int, seed: int) -> None:
        """`numbers`: of the largest tensor."""
        self._numbers = numbers + PERIOD
        self._random = np.random.default_rng(seed)
        self._taken = 0

    def bf16(self, shape: tuple[int, ...]) -> NDArray[np.uint16]:
        return self._view(self._bf16, shape)

    def codes(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self._view(self._codes, shape)

    def e4m3(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Codes without NaN, of numbers below 2."""
        return self._view(self._e4m3, shape)

    def _view(self, plane: NDArray[Plane], shape: tuple[int, ...]) -> NDArray[Plane]:
        """The next place, 64 numbers on."""
        count = int(np.prod(shape))
        self._taken = (self._taken + 8191 * 64) % (plane.size - count + 1) // 64 * 64
        return plane[self._taken : self._taken + count].reshape(shape)

    @cached_property
    def _bf16(self) -> NDArray[np.uint16]:
        values = self._random.standard_normal(PERIOD, np.float32) * np.float32(SIGMA)
        return self._repeated((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16))

    @cached_property
    def _codes(self) -> NDArray[np.uint8]:
        return self._repeated(self._random.integers(0, 256, PERIOD, np.uint8))

    @cached_property
    def _e4m3(self) -> NDArray[np.uint8]:
        return self._repeated(self._random.integers(0, 256, PERIOD, np.uint8) & np.uint8(0xBF))

    def _repeated(self, numbers: NDArray[Plane]) -> NDArray[Plane]:
        return np.resize(numbers, self._numbers)


def random_tensors(model: Model, seed: int) -> Iterator[tuple[str, QTensor]]:
    """Every tensor that the model's map names: norms and factors ones, biases small, the rest normal."""
    rules = model.weight_map.rules
    buffer = Buffer(max(int(np.prod(rule.shape)) for rule in rules), seed)
    for rule in rules:
        yield rule.target, _tensor(buffer, rule.target, rule.shape, model.form)


def _tensor(buffer: Buffer, name: str, shape: tuple[int, ...], form: str) -> QTensor:
    parts = name.split(".")
    if len(shape) == 1 and parts[-1] != "bias":
        return QTensor.from_array(np.full(shape, 0x3F80, np.uint16))  # 1.0
    if form == "bf16" or parts[0] != "layers" or parts[-1] != "weight" or parts[-2] not in LINEARS:
        return QTensor.from_array(buffer.bf16(shape))
    rows, cols = shape
    if form == "fp8":
        return QTensor("fp8", shape, {"q": buffer.e4m3(shape), "s": np.full((rows, 1), SIGMA / _E4M3, np.float32)})
    scales = np.full((rows, cols // GROUP), SIGMA / _INT4, np.float16)
    return QTensor("int4", shape, {"q": buffer.codes((rows, cols // 2)), "s": scales})


# ---------------------------------------------------------------- running


def make_backend(dry: bool, interpreted: bool = False) -> Backend:
    """The backend under test; in a dry run the plain one or, `interpreted`, the same one, at half a second a step."""
    if dry and not interpreted:
        from headrace.backends.torch.backend import TorchBackend

        return TorchBackend()
    from headrace.backends.torch.gpu.backend import GpuBackend

    return GpuBackend("cpu" if dry else "cuda")


@dataclass(slots=True)
class Answers:
    """How a run of requests went; times in seconds from its beginning."""

    seconds: float = 0.0
    """From the first arrival to the last token."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    """When each token came."""
    ends: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens.values()))


class Engine:
    """A loaded model behind the loop that all ways in share."""

    def __init__(
        self,
        model: Model,
        dry: bool,
        *,
        rows: int,
        tokens: int,
        longest: int,
        tensors: Iterator[tuple[str, QTensor]] | None = None,
        seed: int = 0,
        batch_invariant: bool = False,
        interpreted: bool = False,
    ) -> None:
        """`rows`: most requests at a time; `tokens`: most of a step; `longest`: of prompt and answer.
        `interpreted`: see `make_backend`."""
        self.model, self.longest = model, longest
        block = 16
        options = BackendOptions(
            dtype="float32" if dry else "bfloat16",
            device="cpu" if dry else "cuda",
            batch_invariant=batch_invariant,
            threads=1,
            block_size=block,
            num_blocks=rows * -(-longest // block) + 1,
            max_rows=rows,
            max_tokens=tokens,
            max_model_len=longest,
            quant="none" if model.form == "bf16" else "stored",
            kv_dtype="float32" if dry else "bfloat16",
        )
        began = time.monotonic()
        self.backend = make_backend(dry, interpreted)
        try:
            given = random_tensors(model, seed) if tensors is None else tensors
            self.capacity = self.backend.load(model.spec, given, options, Mesh())
        except BaseException:
            self.backend.close()
            raise
        self.load_s = time.monotonic() - began
        self.core = self._core()
        self._count = 0

    def _core(self) -> EngineCore:
        cache = PrefixCache(self.capacity.blocks, self.capacity.block_size, "random", False)
        scheduler = Scheduler(self.capacity, self.longest, frozenset(), parse_policy("fused"), cache)
        limits = EngineLimits(self.model.spec.vocab_size, self.longest)
        return EngineCore(self.backend, scheduler, limits)

    def run(self, prompts: Sequence[Sequence[int]], answers: Sequence[int], arrivals: Sequence[float] = ()) -> Answers:
        """All requests to their end, greedy; `answers`: tokens of each; `arrivals`: seconds, in order; none: at once.

        Raises RuntimeError if one ends with an error.
        """
        self._count += 1
        asked = [
            Request(f"{self._count}/{i}", tuple(ids), SamplingParams(max_tokens=count, ignore_eos=True))
            for i, (ids, count) in enumerate(zip(prompts, answers, strict=True))
        ]
        try:
            return self._run(asked, list(arrivals) or [0.0] * len(asked))
        except Exception:
            self._abort(asked)
            raise

    def _run(self, asked: Sequence[Request], due: Sequence[float]) -> Answers:
        found = Answers()
        began = time.monotonic()
        started = 0
        while started < len(asked) or self.core.has_work:
            now_s = time.monotonic() - began
            while started < len(asked) and due[started] <= now_s:
                self.core.submit(asked[started])
                started += 1
            if not self.core.has_work:
                time.sleep(max(0.0, min(due[started] - now_s, 1.0)))
                continue
            for event in self.core.step():
                _note(found, event, time.monotonic() - began)
        found.seconds = max(found.ends.values()) - due[0]
        return found

    def _abort(self, asked: Sequence[Request]) -> None:
        """Nothing of a run that was broken off is left for the next one."""
        for request in asked:
            self.core.abort(request.id)
        while self.core.has_work:
            self.core.step()

    def close(self) -> None:
        """Gives the device's memory back."""
        self.backend.close()
        del self.core, self.backend
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _note(found: Answers, event: TokenEvent | FinishEvent | ErrorEvent, now_s: float) -> None:
    name = event.request_id.partition("/")[2]
    if isinstance(event, ErrorEvent):
        raise RuntimeError(f"request {name} ended with {event.code}: {event.message}")
    if isinstance(event, FinishEvent):
        found.ends[name] = now_s
    else:
        found.tokens.setdefault(name, []).extend(event.token_ids)
        found.times.setdefault(name, []).extend([now_s] * len(event.token_ids))


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids, none of the first three (which models use for themselves)."""
    numbers = np.random.default_rng(seed).integers(3, vocab_size, (count, length))
    return [[int(one) for one in row] for row in numbers]


def per_token(answers: Answers, name: str = "0") -> float:
    """Seconds a token of one request, its first one left out: that one's step is a prompt's."""
    times = answers.times[name]
    return (times[-1] - times[0]) / (len(times) - 1)
