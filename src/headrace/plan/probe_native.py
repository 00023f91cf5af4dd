"""How fast the native backend's kernels are, run as an engine runs them: programs of operations over its threads, each
operation's own time kept. And what a step of the engine costs that computes next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from headrace.core.flops import attention_flops, causal_flops
from headrace.core.sizing import kv_bytes_per_token, product_bytes, product_flops
from headrace.core.spec import AttentionSpec, EmbeddingSpec, LayerNorms, LayerSpec, MlpSpec, ModelSpec, NormSpec
from headrace.plan.probe_programs import BITS, SEED, VOCAB, Kind, Programs, TimedProducts, copies, run_once
from headrace.plan.probe_tools import FEWEST_PASSES, LARGE, MOST_PASSES, Bench, What
from headrace.plan.profile import Detail

if TYPE_CHECKING:
    from headrace.backends.native import _kernels
    from headrace.engine.core import EngineCore

ROWS: Sequence[int] = (1, 4, 16, 64, 256)
"""M: tokens that a product meets at a time."""
SHAPES: Sequence[tuple[int, int]] = ((2048, 2048), (640, 640))
"""N outputs, K inputs: of a model of a billion parameters, and of one of a hundred million."""
SETS: Sequence[float] = (0.5, 1.5, LARGE)
"""Times the last cache: how much weight few tokens meet, again and again, as step after step of a model does. A small
model stays in the cache, of a larger one a part does: at 1.5 times a third more is read a second than at 4 times."""
READING_ROWS: Sequence[int] = (1, 4)
"""With so few tokens a product is as fast as its weight is read, and is measured with all sets. With more, arithmetic
takes longer, and one set is enough."""
ATTEND_NOTE = "by attention: bytes of keys and values that decoding rows read"
OPERATION_NOTE = "an operation of a step: what one takes that computes next to nothing, as threads wait for each other"
STEP_NOTE = "an engine step: scheduling, plan and sampling, with next to no model"
ROW_TOKENS = 1024
"""Context of a row of the probe of attention."""
DECODE_ROWS = 16
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
KV_DTYPES: Sequence[str] = ("float32", "bfloat16", "int8")
BLOCK = 16
MOST_LAYERS = 16
PREFILL = 512
"""Tokens of the prompt whose attention is timed."""
OPERATIONS = 64
"""Of the program that shows what one costs."""


def _passes(bench: Bench, run: Callable[[], Mapping[int, float]]) -> dict[int, float]:
    """Operation -> mean seconds of passes; the first, which finds cold memory, is not counted. The mean, because a
    model's step is a sum of operations, those that something disturbed among them."""
    run()
    found: dict[int, list[float]] = {}
    end = time.perf_counter() + bench.seconds
    for count in range(1, MOST_PASSES + 1):
        for operation, seconds in run().items():
            found.setdefault(operation, []).append(seconds)
        if count >= FEWEST_PASSES and time.perf_counter() > end:
            break
    return {operation: fmean(seconds) for operation, seconds in found.items()}


class Products:
    """x wᵀ for the shapes, weights, rows and sets above, each product with a weight of its own."""

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        self._bench = bench
        programs = Programs(bench.threads)
        self.instruction_set = programs.instruction_set
        self._products: list[tuple[Kind, Sequence[int], TimedProducts]] = []
        """(kind, rows, products with weights of it that take one set together)"""
        for kind in [(n, k, weights) for n, k in SHAPES for weights in BITS]:
            counts = [copies(*kind, min(times * bench.cache_bytes, bench.memory_bytes)) for times in SETS]
            packed = programs.pack(*kind, max(counts))
            for count in dict.fromkeys(counts):
                rows = ROWS if count == counts[1] else READING_ROWS
                self._products.append((kind, rows, TimedProducts(programs, {kind: packed[:count]}, max(rows))))

    def round(self) -> Iterator[tuple[What, float]]:
        for (n, k, weights), all_rows, products in self._products:
            (operations,) = products.operations.values()
            nbytes = round(product_bytes(0, n, k, BITS[weights]))
            set_bytes = nbytes * len(operations)
            for rows in all_rows:
                spent = _passes(self._bench, partial(products.run, rows))
                seconds = sum(spent[one] for one in operations) / len(operations)
                of: Mapping[str, Detail] = {
                    "weights": weights,
                    "rows": rows,
                    "n": n,
                    "k": k,
                    "weight_bytes": nbytes,
                    "set_bytes": set_bytes,
                }
                yield What("gemm", of, "FLOP/s"), product_flops(rows, n, k) / seconds


class Attention:
    """Decode attention over a paged cache whose blocks lie in an order drawn by lot, and attention over a prompt."""

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        self._bench = bench
        programs = Programs(bench.threads)
        self._stores = {dtype: _PagedRows(bench, programs, dtype) for dtype in KV_DTYPES}

    def round(self) -> Iterator[tuple[What, float]]:
        for dtype, store in self._stores.items():
            seconds = store.seconds(self._bench, store.decode)
            yield What("attend", {"dtype": dtype}, "bytes/s", ATTEND_NOTE), store.nbytes / seconds
            rate = DECODE_ROWS * attention_flops(store.spec, ROW_TOKENS) / seconds
            yield What("attention", {"phase": "decode", "dtype": dtype}, "FLOP/s"), rate
            rate = causal_flops(store.spec, PREFILL) / store.seconds(self._bench, [(0, 0, PREFILL)])
            yield What("attention", {"phase": "prefill", "dtype": dtype}, "FLOP/s"), rate


class _PagedRows:
    """Rows with a full context of stored keys and values, in several layers."""

    def __init__(self, bench: Bench, programs: Programs, dtype: str) -> None:
        import numpy as np

        kernels = programs.kernels
        a_layer = DECODE_ROWS * ROW_TOKENS * kv_bytes_per_token(_model(1, HEADS, KV_HEADS, HEAD_DIM), dtype)
        layers = max(1, min(MOST_LAYERS, round(bench.large / a_layer)))
        self.spec = _model(layers, HEADS, KV_HEADS, HEAD_DIM)
        self.nbytes = DECODE_ROWS * ROW_TOKENS * kv_bytes_per_token(self.spec, dtype)
        blocks = DECODE_ROWS * ROW_TOKENS // BLOCK
        kv = kernels.KvStore(dtype, BLOCK, blocks)
        numbers = [kv.add_layer(KV_HEADS, HEAD_DIM) for _ in self.spec.layers]
        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        store, program = programs.program(kv), programs.program(kv)
        for one in (store, program):
            x, y = programs.embedded(one, qkv), one.buffer(HEADS * HEAD_DIM)
            for layer in numbers:
                one.rotate(x, HEADS, None, None, None, layer)
        shared = -1
        self._operations: list[int] = []
        for layer in numbers:
            self._operations.append(program.attend(shared, x, y, HEADS, HEAD_DIM**-0.5, 0.0, 0, layer))
            shared = self._operations[0]
        order = np.random.default_rng(SEED).permutation(blocks).reshape(DECODE_ROWS, -1).tolist()
        filling = programs.session(store, kv, DECODE_ROWS, ROW_TOKENS, ROW_TOKENS)
        self._session = programs.session(program, kv, DECODE_ROWS, PREFILL, ROW_TOKENS)
        for row, its in enumerate(order):
            for session in (filling, self._session):
                programs.admit(session, row, ROW_TOKENS, its)
            # What was never written lies on no memory of its own.
            run_once(filling, [(row, 0, ROW_TOKENS)])
        self.decode = [(row, ROW_TOKENS - 1, 1) for row in range(DECODE_ROWS)]

    def seconds(self, bench: Bench, asks: Sequence[tuple[int, int, int]]) -> float:
        """Of the attention of all layers."""
        spent = _passes(bench, partial(run_once, self._session, asks))
        return sum(spent[one] for one in self._operations)


class Operations:
    """What an operation costs that does next to nothing, and what norms cost a number."""

    SMALL, WIDTH, TOKENS = 128, 2048, 256

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        import numpy as np

        self._bench = bench
        programs = Programs(bench.threads)
        (weight,) = programs.pack(self.SMALL, self.SMALL, "float32")
        linear = programs.kernels.Linear(weight, None, 0)
        norm = programs.kernels.Norm("rms", 1e-5, np.ones(self.WIDTH, np.float32), None)
        self._products = self._session(programs, self.SMALL, 1, lambda to, x, y: to.product([linear], x, y))
        self._norms = self._session(programs, self.WIDTH, self.TOKENS, lambda to, x, y: to.norm(norm, x, y, True))

    def _session(
        self, programs: Programs, width: int, tokens: int, add: Callable[[_kernels.Program, int, int], int]
    ) -> tuple[_kernels.Session, list[int]]:
        """(session, its operations). `add(program, x, y)`: an operation more, -> its number."""
        kv = programs.kernels.KvStore("float32", tokens, 1)
        program = programs.program(kv)
        x, y = programs.embedded(program, width), program.buffer(width, quantised=True)
        numbers = [add(program, x, y) for _ in range(OPERATIONS)]
        session = programs.session(program, kv, 1, tokens, tokens)
        programs.admit(session, 0, tokens, [0])
        return session, numbers

    def _seconds(self, session: _kernels.Session, numbers: Sequence[int], tokens: int) -> float:
        """Of one operation."""
        spent = _passes(self._bench, partial(run_once, session, [(0, 0, tokens)]))
        return sum(spent[one] for one in numbers) / len(numbers)

    def round(self) -> Iterator[tuple[What, float]]:
        yield What("operation", {}, "s", OPERATION_NOTE), self._seconds(*self._products, 1)
        each = self._seconds(*self._norms, self.TOKENS) / (self.WIDTH * self.TOKENS)
        yield What("rows", {}, "s", "norm and rounding: RMSNorm, then int8"), each


class Steps:
    """Steps of an engine with a model of one small layer: what scheduling, plans and sampling take."""

    ROWS: Sequence[int] = (1, 32)
    STEPS = 48

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        self._core = _tiny_engine(bench.threads, max(self.ROWS), self.STEPS)
        self._asked = 0

    def round(self) -> Iterator[tuple[What, float]]:
        for rows in self.ROWS:
            yield What("step", {"rows": rows}, "s", STEP_NOTE), self._seconds(rows)

    def _seconds(self, rows: int) -> float:
        """Mean of the steps in which all rows decode."""
        from headrace.core.types import FinishEvent, Request, SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=self.STEPS, ignore_eos=True)
        for _ in range(rows):
            self._asked += 1
            self._core.submit(Request(f"probe-{self._asked}", (1, 2, 3), sampling))
        seconds, ended = [], 0
        while ended < rows:
            began = time.perf_counter()
            events = self._core.step()
            seconds.append(time.perf_counter() - began)
            ended += sum(isinstance(event, FinishEvent) for event in events)
        return fmean(seconds[2:-2])


def _model(layers: int, heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    """Of the Llama kind, as wide as its heads."""
    width = heads * head_dim
    norm = NormSpec("rms", 1e-5, width)
    attention = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5)
    layer = LayerSpec(attention, MlpSpec(True, "silu", width), LayerNorms(pre_attn=norm, pre_mlp=norm))
    return ModelSpec("probe", VOCAB, width, ROW_TOKENS, EmbeddingSpec(tied=True), (layer,) * layers, norm)


def _tiny_engine(threads: int, rows: int, tokens: int) -> EngineCore:
    import numpy as np

    from headrace.backends.base import BackendOptions
    from headrace.core.types import EngineLimits
    from headrace.engine.core import EngineCore
    from headrace.engine.model import create_backend
    from headrace.parallel.mesh import Mesh
    from headrace.sched.policy import parse_policy
    from headrace.sched.prefix import PrefixCache
    from headrace.sched.scheduler import Scheduler
    from headrace.weights.qtensor import QTensor

    spec, context = _model(1, 1, 1, 32), 4 * -(-(tokens + 8) // 4)
    width = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCAB, width), "final_norm.weight": (width,)}
    shapes |= {f"layers.0.norms.{name}.weight": (width,) for name in ("pre_attn", "pre_mlp")}
    shapes |= {f"layers.0.attn.{name}.weight": (width, width) for name in "qkvo"}
    shapes |= {f"layers.0.mlp.{name}.weight": (width, width) for name in ("gate", "up", "down")}
    random = np.random.default_rng(SEED)
    tensors = ((name, QTensor.from_array(random.standard_normal(shape, np.float32))) for name, shape in shapes.items())
    options = BackendOptions("float32", threads, BLOCK, rows * -(-context // BLOCK) + 1, rows, 64, context)
    backend = create_backend("native")
    capacity = backend.load(spec, tensors, options, Mesh())
    cache = PrefixCache(capacity.blocks, capacity.block_size, "probe", False)
    scheduler = Scheduler(capacity, context, frozenset(), parse_policy("fused"), cache)
    return EngineCore(backend, scheduler, EngineLimits(VOCAB, context))
