"""Teacher forcing: the logits a backend gives along an answer that is already known, and how far two of them are apart.

One backend is loaded at a time, and never more than 64 positions of logits are held: what the method's own precision
gives waits in a temporary file until the fp32 model gives the same positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.backends.base import Backend, BackendOptions
from headrace.compare.arithmetic import rounded_activations
from headrace.compare.verdict import Epsilon, Scored
from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import EngineError, HeadraceError, NonFiniteLogits, OutOfMemory
from headrace.core.resolve_cuda import card_use, gib, usable_bytes
from headrace.core.sizing import blocks_for, card_budget, kv_bytes_per_block
from headrace.core.types import Admit, ImageSpan, RowStep, SamplingParams, StepPlan
from headrace.engine.hardware import installed_backends, probe_hardware
from headrace.engine.model import OpenModel, create_backend

CHUNK = 64
"""Positions computed, and held as logits, at once."""
PROBE_ANSWERS, PROBE_TOKENS = 4, 16
"""ε is measured on so many answers, with so many tokens of each prompt and of each answer at most: portable kernels
take ten times as long as those for this machine."""
PORTABLE = "portable"
Logits = NDArray[np.float32]
Known = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt, output) in token ids."""
Images = Sequence[tuple[ImageSpan, ...]]
"""The images of each prompt; nothing: there are none."""
Load = Callable[[], Backend]


def reference_of(config: ResolvedConfig) -> ResolvedConfig:
    """What the same-model verdict refers to: plain float32 weights, arithmetic and KV cache, on the methods' own
    backend, so that the verdict does not hang on what else is installed."""
    return replace(config, dtype="float32", quant="none", kv_dtype="float32")


def reference_here(opened: OpenModel, longest: int) -> ResolvedConfig:
    """The same, on the CPU where the GPU has no room for the model in float32 and answers of `longest` tokens.

    To be asked for before anything is loaded. Raises OutOfMemory where the CPU's memory has no room either.
    """
    config = reference_of(opened.config)
    hardware = probe_hardware()
    if config.device != "cuda" or hardware.gpu is None:
        return config
    use = replace(card_use(config), max_num_seqs=1, max_num_batched_tokens=CHUNK, max_model_len=longest)
    cache = blocks_for(longest, config.block_size) * kv_bytes_per_block(opened.spec, "float32", config.block_size)
    budget = card_budget(opened.spec, use, opened.stored, hardware.gpu.multiprocessors)
    usable = usable_bytes(hardware.gpu)
    if budget.total + cache <= usable:
        return config
    if budget.weights + cache > hardware.free_memory_bytes:
        raise OutOfMemory(
            f"the same-model verdict needs the model in float32, {gib(budget.weights + cache)}: {hardware.gpu.name} "
            f"has {gib(usable)} for it, the CPU's memory {gib(hardware.free_memory_bytes)}"
        )
    return replace(config, device="cpu", batch_invariant=True)


def loader(opened: OpenModel, config: ResolvedConfig, longest: int) -> Load:
    """What loads a backend as `config` says, with room for one row of `longest` tokens."""
    options = BackendOptions(
        dtype=config.dtype,
        quant=config.quant,
        kv_dtype=config.kv_dtype,
        threads=config.threads,
        block_size=config.block_size,
        num_blocks=blocks_for(longest, config.block_size),
        max_rows=1,
        max_tokens=CHUNK,
        max_model_len=longest,
        batch_invariant=config.batch_invariant,
        device=config.device,
    )
    return lambda: opened.load_backend(config.backend, options)[0]


def score(
    known: Sequence[Known], block_size: int, own: Load, reference: Load | None, images: Images = ()
) -> list[Scored]:
    """Runs every answer through the method's own arithmetic, then through the reference's.

    `images`: of each of `known`, where any has some. `reference` None: the two are one, and one run serves both. Raises
    EngineError if a backend cannot.
    """
    results = [_Parts() for _ in known]
    with tempfile.TemporaryFile() as spill:
        with closing(own()) as backend:
            for parts, logits in _walk(backend, known, block_size, results, images):
                parts.margins += margins(logits)
                if reference is None:
                    parts.take_reference(logits, [0.0] * len(logits))
                else:
                    spill.write(logits.tobytes())
        if reference is not None:
            spill.seek(0)
            with closing(reference()) as backend:
                for parts, logits in _walk(backend, known, block_size, results, images):
                    parts.take_reference(logits, kl_divergence(logits, _read(spill, logits.shape)))
    return [parts.scored() for parts in results]


def measure_epsilon(opened: OpenModel, config: ResolvedConfig, known: Sequence[Known]) -> Epsilon:
    """ε of the arithmetic `config`, once for a model: 2 × the largest |Δ logit| between two orders of summation.

    The definition asks for the reference at two batch shapes. On a CPU our backends give a row the same bits in every
    batch and chunk, so the other order is another correct way to compute the same numbers (`other_order`); on CUDA it
    is that of the batch-invariant kernels against that of a token at a time, as answers are made. Measured along the
    first of the `known` answers. Where activations are rounded to 8 bits, a sum that moves by its last bit can move a
    whole step of that rounding, and so every layer after it: ε is then as large as the rounding's own error, some
    logits, and most divergences from an engine with other roundings are near-ties.
    Only the ends of prompts are computed, and no images: placeholders are ordinary tokens there.
    Where there is no other order here, or it does not run, ε is 0 and its source says why.
    """
    on_gpu = config.device == "cuda"
    found = other_order(config)
    if found is None and not on_gpu:
        return Epsilon(0.0, 0, f"no second order of summation here for {config.backend} {config.dtype}")
    settings, source = found or (None, "the batch-invariant kernels against the quickest ones, a token at a time")
    if rounded := rounded_activations(config, opened.checkpoint.is_packed):
        source += f", {rounded}"
    probe = [(prompt[-PROBE_TOKENS:], output[:PROBE_TOKENS]) for prompt, output in known if output][:PROBE_ANSWERS]
    if not probe:
        return Epsilon(0.0, 0, "there are no answers to measure it on")
    longest = max(len(prompt) + len(output) for prompt, output in probe)
    own = loader(opened, config, longest)
    try:
        if settings is None:
            other_kernels = replace(config, batch_invariant=not config.batch_invariant)
            largest = order_noise(probe, config.block_size, own, loader(opened, other_kernels, longest), chunk=1)
        else:
            with closing(OpenModel(replace(settings, model=str(opened.checkpoint.path)))) as other:
                largest = order_noise(probe, config.block_size, own, loader(other, other.config, longest))
    except HeadraceError as error:
        return Epsilon(0.0, 0, f"{source}: {error}")
    return Epsilon(2 * largest, sum(len(output) for _, output in probe), source)


def other_order(config: ResolvedConfig) -> tuple[EngineConfig, str] | None:
    """(settings of a backend on the CPU that sums in another order with the same types, both orders in words) or None.

    The kernels for AVX2 and AVX-512 sum in the same order; the portable ones do not. Plain float32 the torch backend
    sums in a third. `model` of the settings is left empty.
    """
    if config.device != "cpu":
        return None
    same = EngineConfig(
        "",
        backend=config.backend,
        device="cpu",
        dtype=config.dtype,
        quant=config.quant,
        kv_dtype=config.kv_dtype,
        threads=config.threads,
        block_size=config.block_size,
        max_num_seqs=1,
    )
    installed = installed_backends()
    plain = (config.dtype, config.quant, config.kv_dtype) == ("float32", "none", "float32")
    if config.backend == "native":
        runs = cast("Sequence[str]", create_backend("native").probe()["available"])
        used = runs[-1] if config.instruction_set == "auto" else config.instruction_set
        others = [name for name in runs if (name == PORTABLE) != (used == PORTABLE)]
        if others:
            source = f"native {used} kernels against {others[-1]} ones"
            return replace(same, instruction_set=others[-1]), source
    other = "torch" if config.backend == "native" else "native"
    if plain and other in installed:
        return replace(same, backend=other), f"the {config.backend} backend against the {other} one"
    return None


def order_noise(known: Sequence[Known], block_size: int, one: Load, other: Load, chunk: int = CHUNK) -> float:
    """The largest |Δ logit| between two backends along the answers, at the positions that foretell their tokens.
    `chunk`: most positions of a step.

    Raises EngineError if a backend cannot.
    """
    results = [_Parts() for _ in known]
    largest = 0.0
    with tempfile.TemporaryFile() as spill:
        with closing(one()) as backend:
            for _, logits in _walk(backend, known, block_size, results, chunk=chunk):
                spill.write(logits.tobytes())
        spill.seek(0)
        with closing(other()) as backend:
            for _, logits in _walk(backend, known, block_size, results, chunk=chunk):
                largest = max(largest, float(np.abs(logits - _read(spill, logits.shape)).max()))
    return largest


@dataclass(slots=True)
class _Parts:
    """A Scored that grows chunk by chunk."""

    margins: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    argmax: list[int] = field(default_factory=list)
    fp32_margins: list[float] = field(default_factory=list)

    def take_reference(self, logits: Logits, kl: Sequence[float]) -> None:
        self.kl += kl
        self.argmax += [int(token) for token in logits.argmax(axis=1)]
        self.fp32_margins += margins(logits)

    def scored(self) -> Scored:
        return Scored(tuple(self.margins), tuple(self.kl), tuple(self.argmax), tuple(self.fp32_margins))


def _read(spill: IO[bytes], shape: tuple[int, ...]) -> Logits:
    count = int(np.prod(shape)) * np.dtype(np.float32).itemsize
    return np.frombuffer(spill.read(count), dtype=np.float32).reshape(shape)


def _walk(
    backend: Backend,
    known: Sequence[Known],
    block_size: int,
    results: Sequence[_Parts],
    images: Images = (),
    chunk: int = CHUNK,
) -> Iterator[tuple[_Parts, Logits]]:
    step = 0
    for index, (prompt, output) in enumerate(known):
        seen = images[index] if images else ()
        for plan in plans(prompt, output, block_size, step, release=index > 0, images=seen, chunk=chunk):
            step = plan.step + 1
            backend.submit(plan)
            (out,) = backend.result().rows
            if out.error is not None:
                raise EngineError(f"scoring answer {index + 1} failed ({out.error.code}): {out.error.message}")
            if plan.rows[0].logits:
                yield results[index], _checked(out.logits, plan.rows[0].length, index)


def _checked(logits: Any, length: int, index: int) -> Logits:
    found = np.asarray(logits, dtype=np.float32)
    if found.ndim != 2 or found.shape[0] != length:
        raise EngineError(f"scoring answer {index + 1}: got logits of shape {found.shape} for {length} positions")
    if not np.isfinite(found).all():
        raise NonFiniteLogits(f"scoring answer {index + 1}: logits that are not finite")
    return found


def plans(
    prompt: Sequence[int],
    output: Sequence[int],
    block_size: int,
    first_step: int,
    release: bool,
    images: tuple[ImageSpan, ...] = (),
    chunk: int = CHUNK,
) -> Iterator[StepPlan]:
    """Plans that compute prompt and output in row 0, with logits at the positions that foretell the output.

    Token i of the output is foretold at position len(prompt) - 1 + i. `release`: row 0 holds an older answer;
    `chunk`: most positions of a plan.
    """
    token_ids = (*prompt, *output)
    known_stop, stop = len(prompt) - 1, len(token_ids) - 1
    edges = [(start, min(start + chunk, known_stop), False) for start in range(0, known_stop, chunk)]
    edges += [(start, min(start + chunk, stop), True) for start in range(known_stop, stop, chunk)]
    blocks = 0
    for number, (start, end, wanted) in enumerate(edges):
        needed = blocks_for(end, block_size)
        row = RowStep(0, start, end - start, new_blocks=tuple(range(blocks, needed)), logits=wanted)
        blocks = needed
        if number:
            yield StepPlan(first_step + number, (row,))
        else:
            admit = Admit(0, token_ids, len(prompt), SamplingParams(), images=images)
            yield StepPlan(first_step, (row,), (admit,), (0,) if release else ())


def kl_divergence(logits_p: Logits, logits_q: Logits) -> list[float]:
    """KL(p ‖ q) = Σ p (log p - log q) in nats, a value a position; logits (positions, vocabulary), summed in float64.

    Never negative: what rounding leaves below zero is zero.
    """
    values = []
    for row_p, row_q in zip(logits_p, logits_q, strict=True):
        log_p, log_q = _log_softmax(row_p), _log_softmax(row_q)
        values.append(max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q)))))
    return values


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def margins(logits: Logits) -> list[float]:
    """Largest logit minus the second largest, a value a position; infinite never: one token alone has margin 0."""
    if logits.shape[1] < 2:
        return [0.0] * len(logits)
    best = np.partition(logits, -2, axis=1)[:, -2:].astype(np.float64)
    return [float(value) for value in best[:, 1] - best[:, 0]]
