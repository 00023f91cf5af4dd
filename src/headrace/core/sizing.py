"""The only formulas for bytes and tokens. The runtime and the planner both use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headrace.core.spec import EncoderSpec, LayerSpec, ModelSpec, NormSpec, ProjectorSpec, RopeSpec

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
SCALED_KV = frozenset({"int8", "fp8"})
"""Types of a KV cache that have a scale for each key and each value of a head."""
SCALE_BYTES = 4
NATIVE_BITS: Mapping[str, float] = {
    "f16": 16, "bf16": 16, "q4_0": 4.5, "q4_1": 5, "q5_0": 8.5, "q5_1": 9, "q8_0": 8.5,
    "q3_K": 8.5625, "q4_K": 4.625, "q5_K": 8.625, "q6_K": 6.5625,
}  # fmt: skip
"""Scheme -> bits a number takes as the native backend keeps it, scales included; what is not here becomes float32."""


def kv_values_per_token(spec: ModelSpec) -> int:
    """Numbers the KV cache holds for one token: a key and a value per layer, KV head and head dimension."""
    return sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in spec.layers)


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """int8 and fp8 have a scale for each key and each value of a head."""
    scales = sum(2 * layer.attention.kv_heads for layer in spec.layers) if dtype in SCALED_KV else 0
    return kv_values_per_token(spec) * DTYPE_BYTES[dtype] + SCALE_BYTES * scales


def kv_bytes_per_block(spec: ModelSpec, dtype: str, block_size: int, lanes: int = 1) -> int:
    """`lanes`: a backend pads the tokens of a block, and the dimensions of a value, to a multiple of it."""
    tokens = _up(block_size, lanes)
    scale = 2 * SCALE_BYTES if dtype in SCALED_KV else 0
    heads = ((layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers)
    each = (count * (DTYPE_BYTES[dtype] * (dim + _up(dim, lanes)) + scale) for count, dim in heads)
    return tokens * sum(each)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def stored_bytes(numbers: Mapping[str, int]) -> int:
    """Bytes of weights that the native backend keeps as stored; scheme -> how many numbers there are."""
    return round(sum(count * NATIVE_BITS.get(scheme, 32) / 8 for scheme, count in numbers.items()))


def product_flops(m: int, n: int, k: int) -> int:
    """Of x wᵀ with x (m, k) and w (n, k): a multiplication and an addition each."""
    return 2 * m * n * k


def product_bytes(m: int, n: int, k: int, bits: float) -> float:
    """What x wᵀ moves at least: w once, `bits` a number (scales included), x and the result as float32."""
    return n * k * bits / 8 + 4 * m * (n + k)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


# ---------------------------------------------------------------- weights


WEIGHT_FORMS: Mapping[str, str] = {
    "bf16": "16 bits a number",
    "fp8": "linear layers of the decoder 8 bits a number and a 32-bit scale a row, the rest bf16",
    "int4": "linear layers of the decoder 4 bits a number and a 16-bit scale for each 128 columns, the rest bf16",
}
"""How weights may be held; the vision side, embedding, head and norms stay bf16, as published checkpoints have it."""
INT4_GROUP = 128
CHANNELS = 3
"""Of a pixel."""
MIB = 2**20
Cut = Literal["rows", "cols", "none"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """`count` weights of one shape. A vector has one column."""

    rows: int
    cols: int = 1
    cut: Cut = "none"
    """Along which of the two tensor parallelism deals it out; none: each GPU holds all of it."""
    linear: bool = False
    """Whether quantised forms pack it."""
    count: int = 1

    @property
    def numbers(self) -> int:
        return self.rows * self.cols * self.count

    def nbytes(self, form: str, gpus: int = 1) -> int:
        """Of one of `gpus`, which deal it out evenly (rounded up)."""
        rows, cols = self.rows, self.cols
        if self.cut == "rows":
            rows = -(-rows // gpus)
        elif self.cut == "cols":
            cols = -(-cols // gpus)
        if not self.linear or form == "bf16":
            each = 2 * rows * cols
        elif form == "fp8":
            each = rows * cols + 4 * rows
        else:
            each = -(-rows * cols // 2) + 2 * rows * -(-cols // INT4_GROUP)
        return each * self.count


def layer_weights(layer: LayerSpec, hidden: int) -> Iterator[Matrix]:
    """One layer of the decoder."""
    attention, mlp = layer.attention, layer.mlp
    queries = attention.heads * attention.head_dim
    keys = attention.kv_heads * attention.head_dim
    for rows in (queries, keys, keys):
        yield from _linear(rows, hidden, attention.qkv_bias, "rows", linear=True)
    yield from _linear(hidden, queries, attention.o_bias, "cols", linear=True)
    yield from _norms(attention.q_norm, attention.k_norm)
    experts = mlp.experts
    if experts is None:
        yield from _mlp(mlp.gated, hidden, mlp.intermediate, mlp.bias, 1)
    else:
        yield Matrix(experts.num_experts, hidden)
        yield from _mlp(mlp.gated, hidden, experts.intermediate, mlp.bias, experts.num_experts)
        if experts.shared_intermediate is not None:
            yield from _mlp(mlp.gated, hidden, experts.shared_intermediate, mlp.bias, 1)
    norms = layer.norms
    yield from _norms(norms.pre_attn, norms.post_attn, norms.pre_mlp, norms.post_mlp)


def end_weights(spec: ModelSpec) -> Iterator[Matrix]:
    """Embedding, final norm and head."""
    table = Matrix(spec.vocab_size, spec.hidden_size, "rows")
    yield table
    if spec.embedding.learned_positions is not None:
        yield Matrix(spec.embedding.learned_positions[1], spec.hidden_size)
    yield from _norms(spec.final_norm)
    if not spec.embedding.tied:
        yield table
    if spec.head.bias:
        yield Matrix(spec.vocab_size, cut="rows")


def encoder_weights(encoder: EncoderSpec, stored: bool = True) -> Iterator[Matrix]:
    """The vision tower. `stored`: with its dummy heads, as the checkpoint holds them; else as it is computed."""
    hidden = encoder.hidden_size
    heads = encoder.heads + (encoder.dummy_heads if stored else 0)
    width = heads * encoder.head_dim
    yield from _linear(hidden, CHANNELS * encoder.patch_size**2, True, "none")
    positions = (encoder.stored_grid or encoder.grid) ** 2
    if encoder.class_token:
        positions += 1
        yield Matrix(hidden)
    yield Matrix(positions, hidden)
    block = [
        *_linear(3 * width, hidden, encoder.qkv_bias, "rows"),
        *_linear(hidden, width, True, "cols"),
        *_linear(encoder.intermediate, hidden, True, "rows"),
        *_linear(hidden, encoder.intermediate, True, "cols"),
        *_norms(encoder.norm, encoder.norm),
    ]
    if encoder.qk_norm is not None:
        block += [Matrix(width), Matrix(width)]
    if encoder.layer_scale:
        block += [Matrix(hidden), Matrix(hidden)]
    yield from _times(encoder.layers, block)


def projector_weights(projector: ProjectorSpec, hidden: int) -> Iterator[Matrix]:
    """`hidden`: of the decoder."""
    yield from _norms(projector.norm)
    yield from _linear(projector.intermediate, projector.width, projector.bias, "rows")
    yield from _linear(hidden, projector.intermediate, projector.bias, "cols")


def parameters(spec: ModelSpec, stored: bool = True) -> int:
    """Numbers in all of the model's weights: decoder, vision tower, projector. `stored`: as in `encoder_weights`."""
    return sum(matrix.numbers for matrix in _all_weights(spec, stored))


def weight_bytes(spec: ModelSpec, form: str = "bf16") -> int:
    """Of the whole model in one of `WEIGHT_FORMS`."""
    return sum(matrix.nbytes(form) for matrix in _all_weights(spec))


def layer_devices(layers: int, gpus: int) -> tuple[int, ...]:
    """The GPU of each layer where the first one also holds the vision side, embedding, norm and head, and so counts as
    half a GPU: the placement that NVLM-D and InternVL publish as `split_model`. The last layer is on GPU 0 again."""
    each = -(-2 * layers // (2 * gpus - 1))
    first = -(-each // 2)
    devices = [0 if index < first else 1 + (index - first) // each for index in range(layers)]
    return (*devices[:-1], 0) if gpus > 1 else (0,) * layers


def placement(layers: int, gpus: int) -> tuple[int, ...]:
    """Layers on each GPU by `layer_devices`, the last one counted on GPU 0."""
    devices = layer_devices(layers, gpus)
    return tuple(devices.count(gpu) for gpu in range(gpus))


def split_bytes(spec: ModelSpec, form: str, gpus: int) -> tuple[int, ...]:
    """Bytes of weights on each GPU where whole layers are placed by `layer_devices`."""
    held = [0] * gpus
    for layer, gpu in zip(spec.layers, layer_devices(len(spec.layers), gpus), strict=True):
        held[gpu] += sum(matrix.nbytes(form) for matrix in layer_weights(layer, spec.hidden_size))
    held[0] += sum(matrix.nbytes(form) for matrix in (*end_weights(spec), *_vision_weights(spec)))
    return tuple(held)


def tensor_parallel_bytes(spec: ModelSpec, form: str, gpus: int) -> int | None:
    """Bytes of weights on each of `gpus` that deal out every layer; None where its heads are not dealt out evenly.

    A vision tower whose heads (dummy ones too) are not either is whole on each of them.
    """
    attentions = [layer.attention for layer in spec.layers]
    if any(attention.heads % gpus or attention.kv_heads % gpus for attention in attentions):
        return None
    decoder = [matrix for layer in spec.layers for matrix in layer_weights(layer, spec.hidden_size)]
    held = sum(matrix.nbytes(form, gpus) for matrix in (*decoder, *end_weights(spec)))
    if spec.vision is not None:
        encoder = spec.vision.encoder
        even = (encoder.heads + encoder.dummy_heads) % gpus == 0
        held += sum(matrix.nbytes(form, gpus if even else 1) for matrix in encoder_weights(encoder))
        held += sum(matrix.nbytes(form, gpus) for matrix in projector_weights(spec.vision.projector, spec.hidden_size))
    return held


def weights_table(
    spec: ModelSpec, gpus: Sequence[int] = (1, 4, 6, 8), forms: Sequence[str] = ("bf16", "fp8", "int4")
) -> str:
    """The bytes of weights on each GPU as text, in MiB: a line for each form and number of GPUs."""
    total = parameters(spec)
    lines = [f"{spec.name}: {total:,} parameters; weights on each GPU in MiB"]
    lines += [f"  {form}: {WEIGHT_FORMS[form]}" for form in forms]
    lines.append(f"{'form':<6}{'GPUs':>5}  {'tensor parallel':>15}  whole layers, GPU 0 first")
    for form in forms:
        for count in gpus:
            each = tensor_parallel_bytes(spec, form, count)
            shown = "heads uneven" if each is None else _mib(each)
            lines.append(f"{form:<6}{count:>5}  {shown:>15}  {_listed(split_bytes(spec, form, count))}")
    return "\n".join(lines)


def _listed(sizes: Sequence[int]) -> str:
    """`32,547 / 25,111 x4 / 18,415`: equal neighbours are counted."""
    runs: list[tuple[str, int]] = []
    for size in map(_mib, sizes):
        count = runs.pop()[1] if runs and runs[-1][0] == size else 0
        runs.append((size, count + 1))
    return " / ".join(size if count == 1 else f"{size} x{count}" for size, count in runs)


def _mib(size: int) -> str:
    return f"{round(size / MIB):,}"


def _all_weights(spec: ModelSpec, stored: bool = True) -> Iterator[Matrix]:
    for layer in spec.layers:
        yield from layer_weights(layer, spec.hidden_size)
    yield from end_weights(spec)
    yield from _vision_weights(spec, stored)


def _vision_weights(spec: ModelSpec, stored: bool = True) -> Iterator[Matrix]:
    if spec.vision is not None:
        yield from encoder_weights(spec.vision.encoder, stored)
        yield from projector_weights(spec.vision.projector, spec.hidden_size)


def _linear(rows: int, cols: int, bias: bool, cut: Cut, linear: bool = False) -> Iterator[Matrix]:
    """A weight, and a bias: cut with the rows, else whole on each GPU."""
    yield Matrix(rows, cols, cut, linear)
    if bias:
        yield Matrix(rows, cut="rows" if cut == "rows" else "none")


def _mlp(gated: bool, hidden: int, inner: int, bias: bool, count: int) -> Iterator[Matrix]:
    """`count`: how many of them there are (experts)."""
    up = [*_linear(inner, hidden, bias, "rows", linear=True)] * (2 if gated else 1)
    yield from _times(count, (*up, *_linear(hidden, inner, bias, "cols", linear=True)))


def _times(count: int, matrices: Iterable[Matrix]) -> Iterator[Matrix]:
    return (replace(matrix, count=count * matrix.count) for matrix in matrices)


def _norms(*norms: NormSpec | None) -> Iterator[Matrix]:
    for norm in norms:
        if norm is not None:
            yield Matrix(norm.width, count=2 if norm.bias else 1)


# ---------------------------------------------------------------- a GPU's memory


GRAPH_BYTES = 512 * MIB
"""Allowed for CUDA graphs and for what libraries hold (cuBLAS: 32 MiB on Hopper)."""
IMAGE_CACHE_BYTES = 256 * MIB
"""Of encoded images that are kept for whoever brings them again. In bfloat16 seven tiles of NVLM-D are 28 MiB, of a
model of 1B parameters 3 MiB."""
SCORED_ROWS = 64
"""Prompt tokens whose logits are there at one time."""
CODES = frozenset({"int8", "int4", "fp8"})
"""quant of linear layers that are rounded at load."""
CARD_GROUP = 32
"""Columns that share a scale and a minimum where weights are rounded to int4."""
PRODUCT_PAD = 16
"""int8 and fp8 products take rows and columns in multiples of it."""
SPLIT_WAVES = 4
"""Attention over long contexts is split until it has so many programs for each multiprocessor."""
INVARIANT_CHUNK, MOST_CHUNKS = 512, 64
"""Where it is batch-invariant: keys of a part at least, and parts of a row."""
PLAIN_TYPES: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Scheme of plain numbers -> their type."""
CARD_BITS: Mapping[str, float] = {"q4_0": 5, "q4_1": 5, "q4_K": 5}
"""Scheme of a GGUF file that a GPU keeps packed -> bits a number takes there, scale and minimum included."""
MOST_MULTIPROCESSORS = 160
"""Where their number is not known; the largest card so far has 148."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint holds, as far as choices depend on it."""

    packed: bool = False
    """Whether its weights are quantised."""
    dtype: str | None = None
    """Type of its plain numbers: float32, bfloat16 or float16; None: it does not say."""
    packed_bytes: int = 0
    """Of the weights that a GPU keeps as they are packed."""
    plain_numbers: int = 0
    """In the other ones, which become plain numbers there."""


def stored_sizes(numbers: Mapping[str, int], schemes: Mapping[str, str]) -> tuple[int, int]:
    """(bytes that stay packed on a GPU, numbers that become plain ones) of a GGUF file: by tensor, how many numbers it
    has and its scheme. Embedding and head become plain."""
    kept = {name for name, scheme in schemes.items() if scheme in CARD_BITS and name.startswith("blk.")}
    packed = sum(numbers[name] * CARD_BITS[schemes[name]] / 8 for name in kept)
    return round(packed), sum(count for name, count in numbers.items() if name not in kept)


def stays_packed(quantisation: object) -> bool:
    """Whether a GPU keeps the weights of a folder as its `quantization_config` says they are packed: 4 bits, or 8 with
    a scale for each row. Other ones become plain numbers there."""
    if not isinstance(quantisation, Mapping):
        return False
    if quantisation.get("quant_method") == "fp8":
        return quantisation.get("weight_block_size") is None
    groups = quantisation.get("config_groups")
    if not isinstance(groups, Mapping):
        return bool(quantisation.get("bits", 4) == 4)
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return all(
        isinstance(one, Mapping) and (one.get("num_bits") == 4 or one.get("strategy") == "channel") for one in weights
    )


@dataclass(frozen=True, slots=True)
class CardUse:
    """How a model is to run on a GPU, as far as it takes memory. Fields as in ResolvedConfig."""

    dtype: str
    quant: str
    kv_dtype: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    batch_invariant: bool = False

    @property
    def tokens(self) -> int:
        """Most of one step."""
        return min(self.max_num_batched_tokens, self.max_num_seqs * self.max_model_len)


@dataclass(frozen=True, slots=True)
class CardBudget:
    """Bytes that a model takes of a GPU beside its KV cache."""

    weights: int
    step: int
    """Most that one step's intermediate results take."""
    images: int
    """The vision side's step, and the cache of encoded images."""
    graphs: int

    @property
    def total(self) -> int:
        return self.weights + self.step + self.images + self.graphs


def card_budget(spec: ModelSpec, use: CardUse, stored: Stored, multiprocessors: int | None = None) -> CardBudget:
    """Weights are exact for the shapes; the rest is the most there can be."""
    return CardBudget(
        card_weight_bytes(spec, use, stored),
        card_step_bytes(spec, use, multiprocessors or MOST_MULTIPROCESSORS),
        _image_bytes(spec, use),
        GRAPH_BYTES,
    )


def card_weight_bytes(spec: ModelSpec, use: CardUse, stored: Stored) -> int:
    """Weights on a GPU, and tables of rotary angles.

    Rounded at load: a 32-bit scale for each row of int8 and fp8, a 16-bit scale and minimum for each 32 columns of
    int4; embedding, head, norms, experts and the vision side stay plain. A packed checkpoint has the bytes of its
    packing, unless experts make it plain.
    """
    size = DTYPE_BYTES[use.dtype]
    experts = any(layer.mlp.experts is not None for layer in spec.layers)
    if stored.packed and use.quant != "none" and not experts:
        return stored.packed_bytes + size * stored.plain_numbers + _rope_bytes(spec, use.max_model_len)
    codes = use.quant in CODES and not stored.packed and not experts
    each = (
        matrix.count * _code_bytes(matrix.rows, matrix.cols, use.quant)
        if codes and matrix.linear
        else size * matrix.numbers
        for matrix in _all_weights(spec, stored=False)
    )
    return sum(each) + _rope_bytes(spec, use.max_model_len)


def _code_bytes(rows: int, cols: int, quant: str) -> int:
    if quant == "int4":
        return rows * -(-cols // CARD_GROUP) * (CARD_GROUP // 2 + 4)
    return _up(rows, PRODUCT_PAD) * _up(cols, PRODUCT_PAD) + SCALE_BYTES * rows


def _rope_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """A float32 cosine and sine for each position and pair, of each kind of rotary embedding."""
    kinds: list[RopeSpec] = []
    for layer in spec.layers:
        rope = layer.attention.rope
        if rope is not None and rope not in kinds:
            kinds.append(rope)
    return sum(2 * 4 * max_model_len * (rope.dim // 2) for rope in kinds)


def card_step_bytes(spec: ModelSpec, use: CardUse, multiprocessors: int) -> int:
    """Most that one step holds beside weights and KV cache.

    Every result of the widest layer at once, since torch's allocator keeps what it gave; logits in the type of
    arithmetic, in float32, and once more for the sampler; of attention that is split along its keys (flash-decoding)
    each part's float32 sum, maximum and denominator: a part for each program, or for each chunk of keys.
    """
    size = DTYPE_BYTES[use.dtype]
    width = max(layer_width(layer, spec.hidden_size) for layer in spec.layers)
    codes = 0
    if use.quant in ("int8", "fp8"):
        codes = max(_widest_input(layer, spec.hidden_size) for layer in spec.layers) + SCALE_BYTES
    logits = max(use.max_num_seqs, SCORED_ROWS) * spec.vocab_size * (size + 2 * 4)
    partials = 0
    for attention in (layer.attention for layer in spec.layers):
        # Rows are split only while there are fewer programs, and then into as many parts as make up the number.
        parts = 2 * SPLIT_WAVES * multiprocessors
        if use.batch_invariant:
            parts *= min(MOST_CHUNKS, -(-use.max_model_len // INVARIANT_CHUNK))
        each = 4 * -(-attention.heads // attention.kv_heads) * (attention.head_dim + 2)
        partials = max(partials, parts * each)
    return use.tokens * (size * width + codes) + logits + partials


def layer_width(layer: LayerSpec, hidden: int) -> int:
    """Numbers that a layer computes for one token: residual stream, its norm and what both parts add; q, k, v and what
    attention gives; the MLP's inner values, and their product; of experts all that for each choice."""
    attention, mlp = layer.attention, layer.mlp
    heads = (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim
    parts = 3 if mlp.gated else 2
    inner = parts * mlp.intermediate
    if mlp.experts is not None:
        inner = mlp.experts.experts_per_token * (parts * mlp.experts.intermediate + 2 * hidden)
        inner += parts * (mlp.experts.shared_intermediate or 0)
    return 4 * hidden + heads + inner


def _widest_input(layer: LayerSpec, hidden: int) -> int:
    return max(hidden, layer.attention.heads * layer.attention.head_dim, layer.mlp.intermediate)


def _image_bytes(spec: ModelSpec, use: CardUse) -> int:
    """One image of the most tiles at a time: pixels (bytes, and as they are computed with), every result of a block."""
    if spec.vision is None:
        return 0
    encoder, projector, tiling = spec.vision.encoder, spec.vision.projector, spec.vision.tiling
    size = DTYPE_BYTES[use.dtype]
    tiles = tiling.max_tiles + (1 if tiling.thumbnail else 0)
    patches = encoder.grid**2 + (1 if encoder.class_token else 0)
    block = 4 * encoder.hidden_size + 4 * encoder.heads * encoder.head_dim + 2 * encoder.intermediate
    rows = projector.tokens * (projector.width + 2 * projector.intermediate + spec.hidden_size)
    pixels = CHANNELS * encoder.tile_size**2 * (1 + 2 * size)
    return tiles * (pixels + size * (patches * block + rows)) + IMAGE_CACHE_BYTES
