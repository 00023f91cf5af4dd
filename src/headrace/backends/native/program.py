"""From a ModelSpec to a program of kernels: which operations, over which buffers, with which weights.

A buffer holds a row of floats a token. Where a product's weights are codes, the buffer it reads is also kept as int8:
the operation that writes it last quantises it. Layers share buffers of one width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.backends import ranges
from headrace.backends.native import _kernels
from headrace.backends.native.weights import GROUP, Tensors
from headrace.backends.rope import rope_angles
from headrace.backends.support import refuse_unsupported
from headrace.core.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec
from headrace.models.names import EMBED, FINAL_NORM, HEAD
from headrace.models.names import layer as name_in_layer

ROUTER = "mlp.router"


@dataclass(frozen=True, slots=True)
class Line:
    """An operation, as `explain` and a profile show it."""

    name: str
    shape: str
    nbytes: int
    """Of its weights."""
    kernel: str
    layer: int | None
    part: str
    """What of the layer, or of the model, it belongs to: attention, mlp, head, or empty: it stands for itself."""
    multiply_adds: int
    """Of a row of activations with weights."""
    read_bytes: int
    """Of weights that every run reads; 0 where that hangs on the rows (experts)."""


@dataclass(frozen=True, slots=True)
class Compiled:
    program: _kernels.FinishedProgram
    lines: Sequence[Line]
    head: int
    """The first operation of the head."""
    logits: int
    """Buffer of logits."""
    linears: Mapping[str, _kernels.Linear]
    """By headrace's name of the layer: where adapters are added."""
    shapes: Mapping[str, tuple[int, int]]


def routers(spec: ModelSpec) -> list[str]:
    """Weights of routers: which experts are chosen must not hang on a rounding."""
    return [
        name_in_layer(index, f"{ROUTER}.weight") for index, one in enumerate(spec.layers) if one.mlp.experts is not None
    ]


def compile_model(
    spec: ModelSpec, tensors: Tensors, kv: _kernels.KvStore, instruction_set: str, max_model_len: int
) -> Compiled:
    """Takes every tensor. Raises UnsupportedModel, and WeightsMismatch for one that is missing, left or misshapen."""
    refuse_unsupported(spec, "native")
    return _Compiler(spec, tensors, kv, instruction_set, max_model_len).compile()


@dataclass(slots=True)
class _Ropes:
    """Layers that turn alike share a table."""

    max_model_len: int
    specs: list[RopeSpec] = field(default_factory=list)
    tables: list[_kernels.RopeTable] = field(default_factory=list)

    def table(self, spec: RopeSpec | None) -> _kernels.RopeTable | None:
        if spec is None:
            return None
        if spec not in self.specs:
            self.specs.append(spec)
            cos, sin = rope_angles(spec, self.max_model_len)
            self.tables.append(_kernels.RopeTable(cos, sin, spec.interleaved))
        return self.tables[self.specs.index(spec)]


class _Compiler:
    def __init__(
        self, spec: ModelSpec, tensors: Tensors, kv: _kernels.KvStore, instruction_set: str, max_model_len: int
    ) -> None:
        self._spec = spec
        self._tensors = tensors
        self._kv = kv
        self._program = _kernels.Program(instruction_set, kv)
        self._any_codes = any(weight.quantised for weight in tensors.weights.values())
        self._buffers: dict[tuple[str, int], int] = {}
        self._linears: dict[str, _kernels.Linear] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._nbytes: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._ropes = _Ropes(max_model_len)
        self._plans: dict[tuple[int, int, int, int], int] = {}
        self._lines: list[Line] = []

    def compile(self) -> Compiled:
        spec, program = self._spec, self._program
        hidden = self._buffer("hidden", spec.hidden_size)
        table = self._tensors.weight(EMBED, spec.vocab_size, spec.hidden_size)
        program.embed(table, spec.embedding.scale, hidden)
        self._line(ranges.EMBED, f"{spec.vocab_size} × {spec.hidden_size}", kernel=table.codes)
        for index, layer in enumerate(spec.layers):
            self._layer(index, layer, hidden)
        head = program.size
        logits = self._head(hidden, table)
        self._tensors.finish()
        return Compiled(program.finish(), self._lines, head, logits, self._linears, self._shapes)

    # ------------------------------------------------------------ layers

    def _layer(self, index: int, spec: LayerSpec, hidden: int) -> None:
        norms, scale = spec.norms, spec.residual_scale
        assert norms.pre_attn is not None
        attention, mlp = spec.attention, spec.mlp
        q_rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        width = self._spec.hidden_size
        names = {"attn.q": q_rows, "attn.k": kv_rows, "attn.v": kv_rows}
        qkv = self._parts(index, names, width, attention.qkv_bias)
        out = self._parts(index, {"attn.o": width}, q_rows, attention.o_bias)
        experts = mlp.experts
        inner = [] if experts is not None else self._inner(index, "mlp", mlp, mlp.intermediate)
        normed = self._buffer("normed", width)

        reads_codes = _any_codes(qkv) or (spec.parallel and _any_codes(inner))
        self._norm(index, "norms.pre_attn", norms.pre_attn, hidden, normed, reads_codes)
        mixed = self._attention(index, attention, qkv, normed, _any_codes(out))
        self._branch(index, "norms.post_attn", norms.post_attn, out, mixed, hidden, scale)
        if not spec.parallel:
            assert norms.pre_mlp is not None
            self._norm(index, "norms.pre_mlp", norms.pre_mlp, hidden, normed, _any_codes(inner))
        if experts is not None:
            branch = self._buffer("branch", width)
            self._experts(index, mlp, experts, normed, branch)
            self._add(index, "norms.post_mlp", norms.post_mlp, branch, hidden, scale)
            return
        down = self._parts(index, {"mlp.down": width}, mlp.intermediate, mlp.bias)
        activated = self._activated(index, mlp, inner, normed, _any_codes(down))
        self._branch(index, "norms.post_mlp", norms.post_mlp, down, activated, hidden, scale)

    def _attention(
        self, index: int, spec: AttentionSpec, qkv: list[_kernels.Linear], normed: int, quantise: bool
    ) -> int:
        """-> the buffer of mixed values."""
        q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        rows = self._buffer("qkv", q_rows + 2 * kv_rows)
        mixed = self._buffer("mixed", q_rows)
        program = self._program
        self._product(index, "attn.qkv", qkv, normed, rows)
        layer = self._kv.add_layer(spec.kv_heads, spec.head_dim)
        q_norm = self._norm_of(index, "attn.q_norm", spec.q_norm)
        k_norm = self._norm_of(index, "attn.k_norm", spec.k_norm)
        program.rotate(rows, spec.heads, q_norm, k_norm, self._ropes.table(spec.rope), layer)
        self._line("rotate, store", f"{spec.heads} + {spec.kv_heads} heads of {spec.head_dim}", index, ranges.ATTENTION)
        window = spec.window or 0
        shape = (spec.heads, spec.kv_heads, spec.head_dim, window)
        shared = self._plans.get(shape, -1)
        number = program.attend(shared, rows, mixed, spec.heads, spec.scale, spec.softcap or 0.0, window, layer)
        self._plans.setdefault(shape, number)
        self._line("attend", f"{spec.heads} heads of {spec.head_dim}, {spec.kv_heads} of keys", index, ranges.ATTENTION)
        if quantise:
            program.quantise(mixed)
            self._line("quantise", f"{q_rows}", index, ranges.ATTENTION)
        return mixed

    def _activated(self, index: int, spec: MlpSpec, inner: list[_kernels.Linear], normed: int, quantise: bool) -> int:
        """-> the buffer of what the MLP's first half gives."""
        rows = self._buffer("inner", spec.intermediate * len(inner))
        activated = self._buffer("activated", spec.intermediate)
        self._program.mlp_inner(inner, spec.activation, normed, rows, activated, quantise)
        if spec.gated:
            self._linear_line(index, f"mlp.gate, up, {spec.activation}", ("mlp.gate", "mlp.up"))
        else:
            self._linear_line(index, f"mlp.up, {spec.activation}", ("mlp.up",))
        return activated

    def _inner(self, index: int, part: str, spec: MlpSpec, width: int) -> list[_kernels.Linear]:
        names = {f"{part}.gate": width, f"{part}.up": width} if spec.gated else {f"{part}.up": width}
        return self._parts(index, names, self._spec.hidden_size, spec.bias)

    def _experts(self, index: int, spec: MlpSpec, moe: MoeSpec, x: int, y: int) -> None:
        width, hidden, chosen = moe.intermediate, self._spec.hidden_size, moe.experts_per_token
        router = self._parts(index, {ROUTER: moe.num_experts}, hidden, False)[0]
        experts = []
        for expert in range(moe.num_experts):
            part = f"mlp.experts.{expert}"
            inner = self._inner(index, part, spec, width)
            experts.append((inner, self._parts(index, {f"{part}.down": hidden}, width, False)[0]))
        halves = 2 if spec.gated else 1
        widths = {"gathered": hidden, "inner of experts": halves * width, "activated by experts": width}
        buffers = [self._buffer(name, size, chosen) for name, size in {**widths, "answers": hidden}.items()]
        self._program.experts(
            router, experts, x, y, buffers, chosen, width, moe.normalise_weights, spec.gated, spec.activation
        )
        names = [name for name in self._nbytes if name.startswith(name_in_layer(index, "mlp."))]
        nbytes = sum(self._nbytes[name] for name in names)
        kinds = sorted({self._kinds[name] for name in names if name != name_in_layer(index, ROUTER)})
        shape = f"{chosen} of {moe.num_experts} × {width}"
        multiply_adds = hidden * (moe.num_experts + chosen * (halves + 1) * width)
        self._line("experts", shape, index, ranges.MLP, nbytes, ", ".join(kinds), multiply_adds, read_bytes=0)

    def _head(self, hidden: int, table: _kernels.Weight) -> int:
        spec, program = self._spec, self._program
        width = spec.hidden_size
        weight = table if spec.embedding.tied else self._tensors.weight(f"{HEAD}.weight", spec.vocab_size, width)
        bias = self._tensors.vector(f"{HEAD}.bias", spec.vocab_size) if spec.head.bias else None
        linear = self._keep(HEAD, weight, _kernels.Linear(weight, bias, 0))
        rows = self._head_buffer(width, quantised=False)
        normed = self._head_buffer(width, quantised=weight.quantised)
        logits = self._head_buffer(spec.vocab_size, quantised=False)
        program.gather(hidden, rows)
        self._line("gather", f"{width}", part=ranges.HEAD)
        norm = self._make_norm(FINAL_NORM, spec.final_norm)
        program.norm(norm, rows, normed, weight.quantised)
        self._line("final norm", f"{width}", part=ranges.HEAD)
        program.product([linear], normed, logits)
        shape = f"{spec.vocab_size} × {width}"
        self._line("head", shape, None, ranges.HEAD, weight.nbytes, _weight_kind(weight), spec.vocab_size * width)
        if spec.head.scale != 1.0 or spec.head.softcap is not None:
            program.scale_rows(spec.head.scale, spec.head.softcap or 0.0, logits)
            self._line("scale", f"{spec.vocab_size}", part=ranges.HEAD)
        return logits

    # ------------------------------------------------------------ parts

    def _branch(
        self, index: int, part: str, norm: NormSpec | None, layers: list[_kernels.Linear], x: int, y: int, scale: float
    ) -> None:
        """y += scale × norm(x wᵀ)"""
        name = "attn.o" if part.endswith("attn") else "mlp.down"
        if norm is None:
            self._product(index, name, layers, x, y, add=True, scale=scale)
            return
        branch = self._buffer("branch", self._spec.hidden_size)
        self._product(index, name, layers, x, branch)
        self._add(index, part, norm, branch, y, scale)

    def _add(self, index: int, part: str, norm: NormSpec | None, x: int, y: int, scale: float) -> None:
        if norm is not None:
            self._norm(index, part, norm, x, x, False)
        self._program.add_rows(scale, x, y)
        self._line("add", f"{self._spec.hidden_size}", index)

    def _product(
        self,
        index: int,
        name: str,
        layers: list[_kernels.Linear],
        x: int,
        y: int,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        self._program.product(layers, x, y, add, scale)
        self._linear_line(index, name, ("attn.q", "attn.k", "attn.v") if name == "attn.qkv" else (name,))

    def _linear_line(self, index: int, name: str, parts: Sequence[str]) -> None:
        names = [name_in_layer(index, part) for part in parts]
        rows, columns = sum(self._shapes[one][0] for one in names), self._shapes[names[0]][1]
        nbytes = sum(self._nbytes[one] for one in names)
        part = ranges.ATTENTION if name.startswith("attn.") else ranges.MLP
        self._line(name, f"{rows} × {columns}", index, part, nbytes, self._kind(names), rows * columns)

    def _parts(self, index: int, parts: Mapping[str, int], columns: int, bias: bool) -> list[_kernels.Linear]:
        """Layers whose outputs lie beside each other. `parts`: name -> rows."""
        layers, column = [], 0
        for part, rows in parts.items():
            name = name_in_layer(index, part)
            weight = self._tensors.weight(f"{name}.weight", rows, columns)
            biases = self._tensors.vector(f"{name}.bias", rows) if bias else None
            layers.append(self._keep(name, weight, _kernels.Linear(weight, biases, column)))
            column += rows
        return layers

    def _keep(self, name: str, weight: _kernels.Weight, linear: _kernels.Linear) -> _kernels.Linear:
        self._linears[name] = linear
        self._shapes[name] = (weight.rows, weight.columns)
        self._nbytes[name] = weight.nbytes
        self._kinds[name] = _weight_kind(weight)
        return linear

    def _kind(self, names: Sequence[str]) -> str:
        return ", ".join(dict.fromkeys(self._kinds[name] for name in names))

    def _norm(self, index: int, part: str, spec: NormSpec, x: int, y: int, quantise: bool) -> None:
        self._program.norm(self._make_norm(name_in_layer(index, part), spec), x, y, quantise)
        self._line(f"{part.removeprefix('norms.')} norm", f"{spec.width}", index)

    def _norm_of(self, index: int, part: str, spec: NormSpec | None) -> _kernels.Norm | None:
        return None if spec is None else self._make_norm(name_in_layer(index, part), spec)

    def _make_norm(self, name: str, spec: NormSpec) -> _kernels.Norm:
        weight = self._tensors.vector(f"{name}.weight", spec.width)
        bias = self._tensors.vector(f"{name}.bias", spec.width) if spec.bias else None
        return _kernels.Norm(spec.kind, spec.eps, weight + 1 if spec.unit_offset else weight, bias)

    def _buffer(self, kind: str, width: int, rows_a_token: int = 1) -> int:
        key = (kind, width)
        if key not in self._buffers:
            quantised = self._any_codes and width % GROUP == 0
            self._buffers[key] = self._program.buffer(width, quantised, rows_a_token)
        return self._buffers[key]

    def _head_buffer(self, width: int, quantised: bool) -> int:
        return self._program.buffer(width, quantised, head=True)

    def _line(
        self,
        name: str,
        shape: str,
        layer: int | None = None,
        part: str = "",
        nbytes: int = 0,
        kernel: str = "f32",
        multiply_adds: int = 0,
        read_bytes: int | None = None,
    ) -> None:
        """`read_bytes`: None: all of its weights."""
        read = nbytes if read_bytes is None else read_bytes
        self._lines.append(Line(name, shape, nbytes, kernel, layer, part, multiply_adds, read))


def _any_codes(layers: Sequence[_kernels.Linear]) -> bool:
    return any(layer.quantised for layer in layers)


def _weight_kind(weight: _kernels.Weight) -> str:
    return f"{weight.codes} × int8 ({weight.scheme})" if weight.quantised else weight.codes
