"""How fast the native backend's kernels are, run as an engine runs them: programs of operations over its threads, each
operation's own time kept. And what a step of the engine costs that computes next to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from headrace.core.flops import attention_flops, causal_flops
from headrace.core.sizing import kv_bytes_per_token, product_flops
from headrace.core.spec import AttentionSpec, EmbeddingSpec, LayerNorms, LayerSpec, MlpSpec, ModelSpec, NormSpec
from headrace.plan.probe_tools import FEWEST_PASSES, MOST_PASSES, Bench, What

if TYPE_CHECKING:
    from headrace.backends.native import _kernels
    from headrace.engine.core import EngineCore

ROWS: Sequence[int] = (1, 4, 16, 64, 256)
"""M: tokens that a product meets at a time."""
SHAPES: Sequence[tuple[int, int]] = ((2048, 2048), (640, 640))
"""N outputs, K inputs: of a model of a billion parameters, and of one of a hundred million."""
WEIGHTS: Sequence[str] = ("float32", "int8", "int4")
"""float32 activations with the first, int8 ones with the others."""
FEWEST_PRODUCTS, MOST_PRODUCTS = 3, 288
BEYOND_CACHE = 1.5
"""Times the last cache: what the weights of one kind, or the keys and values of one type, take together, so that each
is read from memory, as in a model's step."""
ATTEND_NOTE = "by attention: bytes of keys and values that decoding rows read"
VOCAB = 64
ROW_TOKENS = 1024
"""Context of a row of the probe of attention."""
DECODE_ROWS = 16
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
KV_DTYPES: Sequence[str] = ("float32", "bfloat16", "int8")
BLOCK = 16
MOST_LAYERS = 16
PREFILL = 512
"""Tokens of the prompt whose attention is timed."""
WHOLE = -1
"""In place of an operation: from the first one's beginning to the last one's end."""
OPERATIONS = 64
"""Of the program that shows what one costs."""
SEED = 9


class _Programs:
    """Makes programs and the sessions that run them."""

    def __init__(self, threads: int) -> None:
        """Raises BackendUnavailable."""
        from headrace.engine.model import create_backend

        self.instruction_set = str(create_backend("native").probe()["instructions"])
        from headrace.backends.native import _kernels

        self.kernels = _kernels
        self.threads = threads
        self.packer = _kernels.Packer(threads)

    def pack(self, n: int, k: int, weights: str) -> _kernels.Weight:
        import numpy as np

        block = np.random.default_rng(SEED).standard_normal(min(n * k, 1 << 18), np.float32)
        numbers = np.resize(block, (n, k))
        if weights == "float32":
            packed = self.kernels.pack_numbers(self.packer, numbers, "f32", "f32")
        else:
            packed = self.kernels.quantise_numbers(self.packer, int(weights.removeprefix("int")), numbers, "f32")
        self.packer.finish()
        return packed

    def session(
        self, program: _kernels.Program, kv: _kernels.KvStore, rows: int, most_tokens: int, context: int
    ) -> _kernels.Session:
        """Of a program without a head: nothing is sampled. Keeps each operation's time."""
        head, logits = program.size, program.buffer(VOCAB, head=True)
        limits = (VOCAB, rows, most_tokens, context)
        session = self.kernels.Session(program.finish(), kv, *limits, self.threads, head, logits)
        session.profile(True)
        return session

    def admit(self, session: _kernels.Session, row: int, tokens: int, blocks: Sequence[int]) -> None:
        from headrace.core.types import SamplingParams

        ids = [index % VOCAB for index in range(tokens)]
        session.admit(row, ids, tokens, self.kernels.RowSampling(SamplingParams(), tokens, (), VOCAB), -1)
        session.append_blocks(row, blocks)


def _passes(bench: Bench, run: Iterator[Mapping[int, float]]) -> dict[int, float]:
    """Operation -> median seconds of the passes that `run` gives."""
    next(run)
    found: dict[int, list[float]] = {}
    end = time.perf_counter() + bench.seconds
    for count, spent in enumerate(run, 1):
        for operation, seconds in spent.items():
            found.setdefault(operation, []).append(seconds)
        if count >= FEWEST_PASSES and (count >= MOST_PASSES or time.perf_counter() > end):
            break
    return {operation: median(seconds) for operation, seconds in found.items()}


def _runs(session: _kernels.Session, asks: Sequence[tuple[int, int, int]]) -> Iterator[dict[int, float]]:
    """One pass after another of the same (row, start, length): operation -> seconds."""
    session.take_timings()
    while True:
        for row, start, length in asks:
            session.ask(row, start, length, (), False, False, False, None)
        session.run()
        times = [one for one in session.take_timings().tolist() if one[0] >= 0]
        spent = {operation: (end - begin) / 1e9 for operation, _, begin, end in times}
        yield spent | {WHOLE: (times[-1][3] - times[0][2]) / 1e9}


def _beyond_cache(bench: Bench, nbytes: int) -> int:
    """How many things of this size are together larger than the last cache."""
    return max(1, round(min(BEYOND_CACHE * bench.cache_bytes, bench.memory_bytes) / nbytes))


class Products:
    """x wᵀ for the shapes, weights and rows above, each product with a weight of its own."""

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        self._bench = bench
        programs = _Programs(bench.threads)
        self.instruction_set = programs.instruction_set
        self._sessions: dict[tuple[int, int, str], tuple[_kernels.Session, list[int], int]] = {}
        for n, k in SHAPES:
            for weights in WEIGHTS:
                self._sessions[n, k, weights] = self._program(programs, n, k, weights)

    def _program(self, programs: _Programs, n: int, k: int, weights: str) -> tuple[_kernels.Session, list[int], int]:
        """(session, its products, bytes of the weight of one)"""
        kernels = programs.kernels
        kv = kernels.KvStore("float32", max(ROWS), 1)
        program = kernels.Program(programs.instruction_set, kv)
        codes = weights != "float32"
        x, y = program.buffer(k, quantised=codes), program.buffer(n)
        program.embed(programs.pack(VOCAB, k, "float32"), 1.0, x)
        if codes:
            program.quantise(x)
        first = programs.pack(n, k, weights)
        count = max(FEWEST_PRODUCTS, min(MOST_PRODUCTS, _beyond_cache(self._bench, first.nbytes)))
        packed = [first, *(programs.pack(n, k, weights) for _ in range(count - 1))]
        operations = [program.product([kernels.Linear(one, None, 0)], x, y) for one in packed]
        session = programs.session(program, kv, 1, max(ROWS), max(ROWS))
        programs.admit(session, 0, max(ROWS), [0])
        return session, operations, first.nbytes

    def round(self) -> Iterator[tuple[What, float]]:
        for (n, k, weights), (session, operations, nbytes) in self._sessions.items():
            for rows in ROWS:
                spent = _passes(self._bench, _runs(session, [(0, 0, rows)]))
                seconds = sum(spent[one] for one in operations) / len(operations)
                of: Mapping[str, str | int] = {"weights": weights, "rows": rows, "n": n, "k": k, "weight_bytes": nbytes}
                yield What("gemm", of, "FLOP/s"), product_flops(rows, n, k) / seconds


class Attention:
    """Decode attention over a paged cache whose blocks lie in an order drawn by lot, and attention over a prompt."""

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        self._bench = bench
        programs = _Programs(bench.threads)
        self._stores = {dtype: _PagedRows(bench, programs, dtype) for dtype in KV_DTYPES}

    def round(self) -> Iterator[tuple[What, float]]:
        for dtype, store in self._stores.items():
            seconds = store.seconds(self._bench, store.decode)
            yield (
                What("attend", {"dtype": dtype}, "bytes/s", ATTEND_NOTE),
                store.nbytes / seconds,
            )
            rate = DECODE_ROWS * attention_flops(store.spec, ROW_TOKENS) / seconds
            yield What("attention", {"phase": "decode", "dtype": dtype}, "FLOP/s"), rate
            rate = causal_flops(store.spec, PREFILL) / store.seconds(self._bench, [(0, 0, PREFILL)])
            yield What("attention", {"phase": "prefill", "dtype": dtype}, "FLOP/s"), rate


class _PagedRows:
    """Rows with a full context of stored keys and values, in several layers."""

    def __init__(self, bench: Bench, programs: _Programs, dtype: str) -> None:
        import numpy as np

        kernels = programs.kernels
        a_layer = DECODE_ROWS * ROW_TOKENS * kv_bytes_per_token(_model(1, HEADS, KV_HEADS, HEAD_DIM), dtype)
        self.spec = _model(min(MOST_LAYERS, _beyond_cache(bench, a_layer)), HEADS, KV_HEADS, HEAD_DIM)
        self.nbytes = DECODE_ROWS * ROW_TOKENS * kv_bytes_per_token(self.spec, dtype)
        blocks = DECODE_ROWS * ROW_TOKENS // BLOCK
        kv = kernels.KvStore(dtype, BLOCK, blocks)
        numbers = [kv.add_layer(KV_HEADS, HEAD_DIM) for _ in self.spec.layers]
        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        table = programs.pack(VOCAB, qkv, "float32")
        store, program = (kernels.Program(programs.instruction_set, kv) for _ in range(2))
        for one in (store, program):
            x, y = one.buffer(qkv), one.buffer(HEADS * HEAD_DIM)
            one.embed(table, 1.0, x)
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
            filling.ask(row, 0, ROW_TOKENS, (), False, False, False, None)
            filling.run()
        self.decode = [(row, ROW_TOKENS - 1, 1) for row in range(DECODE_ROWS)]

    def seconds(self, bench: Bench, asks: Sequence[tuple[int, int, int]]) -> float:
        """Of the attention of all layers."""
        spent = _passes(bench, _runs(self._session, asks))
        return sum(spent[one] for one in self._operations)


class Operations:
    """What an operation costs that does next to nothing, and what norms cost a number."""

    SMALL, WIDTH, TOKENS = 128, 2048, 256

    def __init__(self, bench: Bench) -> None:
        """Raises BackendUnavailable."""
        import numpy as np

        self._bench = bench
        programs = _Programs(bench.threads)
        linear = programs.kernels.Linear(programs.pack(self.SMALL, self.SMALL, "float32"), None, 0)
        norm = programs.kernels.Norm("rms", 1e-5, np.ones(self.WIDTH, np.float32), None)
        self._products = self._session(programs, self.SMALL, 1, linear)
        self._norms = self._session(programs, self.WIDTH, self.TOKENS, norm)

    def _session(
        self, programs: _Programs, width: int, tokens: int, operation: _kernels.Linear | _kernels.Norm
    ) -> _kernels.Session:
        kernels = programs.kernels
        kv = kernels.KvStore("float32", tokens, 1)
        program = kernels.Program(programs.instruction_set, kv)
        x, y = program.buffer(width), program.buffer(width, quantised=True)
        program.embed(programs.pack(VOCAB, width, "float32"), 1.0, x)
        for _ in range(OPERATIONS):
            if isinstance(operation, kernels.Linear):
                program.product([operation], x, y)
            else:
                program.norm(operation, x, y, True)
        session = programs.session(program, kv, 1, tokens, tokens)
        programs.admit(session, 0, tokens, [0])
        return session

    def round(self) -> Iterator[tuple[What, float]]:
        alone = _passes(self._bench, _runs(self._products, [(0, 0, 1)]))[WHOLE] / OPERATIONS
        yield What("operation", {}, "s", "an operation: what it takes whatever its size, as the threads meet"), alone
        each = _passes(self._bench, _runs(self._norms, [(0, 0, self.TOKENS)]))[WHOLE] / OPERATIONS
        numbers = self.WIDTH * self.TOKENS
        yield What("rows", {}, "s", "norm and rounding: RMSNorm, then int8"), each / numbers


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
            yield (
                What(
                    "step", {"rows": rows}, "s", "an engine step: scheduling, plan and sampling, with next to no model"
                ),
                self._seconds(rows),
            )

    def _seconds(self, rows: int) -> float:
        """Median of the steps in which all rows decode."""
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
        return median(seconds[2:-2])


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
