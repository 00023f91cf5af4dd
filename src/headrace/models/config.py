"""A strict, typed reader over a checkpoint's config. A config file is untrusted: every value is checked once, here.

A missing key, a wrong type or a size out of bounds is a `CheckpointError`; a well-formed value that headrace has no
word for is an `UnsupportedModel`. Each message is one line: where, key, value, what is allowed. A null counts as
absent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.core.spec import Activation, MlpSpec

T = TypeVar("T")

MAX_SIZE = 2**24
"""Bound of any size that has none of its own: a hostile config must not make a monster."""
MAX_LAYERS = 10_000
MAX_VOCAB = 10_000_000
MAX_HEADS = 2**16
MAX_CONTEXT = 2**30
MAX_EXPERTS_IN_ALL = 2**16
"""Experts a layer × layers."""
MAX_FLOAT = 1e30

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' name -> ours; the tanh formula has several names."""

DTYPES: Mapping[str, str] = {
    prefix + name: name for prefix in ("", "torch.") for name in ("float32", "float16", "bfloat16")
}


class ConfigReader:
    """`get_*` returns a value, or the default where the key is absent (no default: the key is required);
    `find_*` returns None where the key is absent. Raises CheckpointError and UnsupportedModel."""

    def __init__(self, config: object, where: str) -> None:
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{where} is {shorten(config)}, allowed: an object of keys and values")
        self._config = config
        self.where = where

    def has(self, key: str) -> bool:
        return self._config.get(key) is not None

    def __contains__(self, key: str) -> bool:
        """Present, if only as a null."""
        return key in self._config

    def refuse_unknown(self, known: Collection[str], prefix: str = "") -> None:
        """For the tables in which every key means mathematics: a key under `prefix` must be one of `known`."""
        for key in self._config:
            if self.has(key) and key.startswith(prefix) and key.removeprefix(prefix) not in known:
                allowed = ", ".join(sorted(known))
                raise UnsupportedModel(f"{self.where}: key {shorten(key)} is unknown, allowed: {prefix}{{{allowed}}}")

    def first_of(self, *keys: str) -> str:
        """The first key that is present; the first of all where none is. For keys with two spellings."""
        return next((key for key in keys if self.has(key)), keys[0])

    def bad(self, key: str, allowed: str) -> NoReturn:
        """The file is at fault: missing key, wrong type, out of range."""
        if not self.has(key):
            raise CheckpointError(f"{self.where}: {key} is missing, allowed: {allowed}")
        raise CheckpointError(f"{self.where}: {key} is {shorten(self._config[key])}, allowed: {allowed}")

    def unsupported(self, key: str, allowed: str) -> NoReturn:
        """The value means something that headrace does not do."""
        raise UnsupportedModel(f"{self.where}: {key} is {shorten(self._config.get(key))}, allowed: {allowed}")

    def require(self, key: str, allowed: object) -> None:
        """Absent or equal to `allowed`: for values that would change the mathematics in a way no spec says."""
        if self.has(key) and not (isinstance(self._config[key], str | int | float) and self._config[key] == allowed):
            self.unsupported(key, "absent" if allowed is None else f"absent or {allowed!r}")

    # ------------------------------------------------------------ numbers

    def find_int(self, key: str, low: int = 1, high: int = MAX_SIZE) -> int | None:
        if not self.has(key):
            return None
        value = self._config[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.bad(key, f"an integer from {low} to {high}")
        return value

    def get_int(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.find_int(key, low, high)
        value = default if value is None else value
        return self.bad(key, f"an integer from {low} to {high}") if value is None else value

    def get_side(self, key: str, default: int, high: int = MAX_SIZE) -> int:
        """An integer, or a list of two equal ones: height and width of a square."""
        value = self._config.get(key)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            return ConfigReader({key: value[0]}, self.where).get_int(key, high=high)
        return self.get_int(key, default, high=high)

    def find_float(self, key: str, low: float = 0.0, high: float = MAX_FLOAT) -> float | None:
        """A finite number above `low`, up to `high`."""
        if not self.has(key):
            return None
        value = self._config[key]
        # The range is tested before the conversion: a NaN fails it, and float() of a huge integer overflows.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            self.bad(key, f"a number above {low:g}, up to {high:g}")
        return float(value)

    def get_float(self, key: str, default: float | None = None, low: float = 0.0, high: float = MAX_FLOAT) -> float:
        value = self.find_float(key, low, high)
        value = default if value is None else value
        return self.bad(key, f"a number above {low:g}, up to {high:g}") if value is None else value

    def get_bool(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        value = self._config[key]
        return value if isinstance(value, bool) else self.bad(key, "true or false")

    # ------------------------------------------------------------ words, lists, tables

    def find_str(self, key: str) -> str | None:
        if not self.has(key):
            return None
        value = self._config[key]
        return value if isinstance(value, str) else self.bad(key, "a string")

    def get_choice(self, key: str, choices: Mapping[str, T], default: str | None = None) -> T:
        """What the word at `key` stands for in `choices`."""
        word = self.find_str(key)
        word = default if word is None else word
        if word is None:
            self.bad(key, f"one of {', '.join(choices)}")
        return choices[word] if word in choices else self.unsupported(key, f"one of {', '.join(choices)}")

    def find_choices(self, key: str, choices: Sequence[str], length: int) -> tuple[str, ...] | None:
        """`length` words, each one of `choices`."""
        words = self.find_list(key, f"{length} words out of {', '.join(choices)}", length)
        if words is None:
            return None
        if not all(isinstance(word, str) for word in words):
            self.bad(key, f"{length} words out of {', '.join(choices)}")
        if any(word not in choices for word in words):
            self.unsupported(key, f"{length} words out of {', '.join(choices)}")
        return tuple(words)

    def get_floats(self, key: str, length: int) -> tuple[float, ...]:
        """`length` finite numbers above 0."""
        allowed = f"{length} numbers above 0"
        values = self.find_list(key, allowed, length)
        if values is None:
            self.bad(key, allowed)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
                self.bad(key, allowed)
        return tuple(float(value) for value in values)

    def get_indices(self, key: str) -> frozenset[int]:
        """A set of integers ≥ 0; the empty set where the key is absent."""
        values = self.find_list(key, "a list of integers ≥ 0") or ()
        if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in values):
            self.bad(key, "a list of integers ≥ 0")
        return frozenset(values)

    def find_table(self, key: str) -> ConfigReader | None:
        """A nested object; None where it is absent or empty."""
        if not self.has(key) or self._config[key] == {}:
            return None
        return ConfigReader(self._config[key], f"{self.where}: {key}")

    def find_list(self, key: str, allowed: str, length: int | None = None) -> Sequence[Any] | None:
        """A list, of `length` things where that is given; what they are is the caller's to check."""
        if not self.has(key):
            return None
        value = self._config[key]
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            self.bad(key, allowed)
        return value


def read_dtype(config: ConfigReader) -> str | None:
    """The float type a checkpoint says it holds: float32, float16, bfloat16, or None where it does not say."""
    key = config.first_of("dtype", "torch_dtype")
    return config.get_choice(key, DTYPES) if config.has(key) else None


def read_architecture(config: ConfigReader) -> str | None:
    """`architectures[0]`, or None where the list is absent or empty."""
    names = config.find_list("architectures", "a list of names")
    if not names:
        return None
    return names[0] if isinstance(names[0], str) else config.bad("architectures", "a list of names")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every architecture has, checked against each other."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int


def read_sizes(
    config: ConfigReader, context: int, *, kv_heads: int | None = None, head_dim: int | None = None
) -> Sizes:
    """The sizes under their usual names; the arguments are the architecture's defaults of max_position_embeddings,
    and of num_key_value_heads and head_dim where the key is missing: a null means the number that the others give."""
    hidden = config.get_int("hidden_size")
    heads = config.get_int("num_attention_heads", high=MAX_HEADS)
    if kv_heads is None or "num_key_value_heads" in config:
        kv_heads = config.get_int("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        config.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim is None or "head_dim" in config:
        head_dim = config.find_int("head_dim", high=MAX_HEADS)
    if head_dim is None and hidden % heads:
        config.bad("hidden_size", f"a multiple of num_attention_heads ({heads}) where no head_dim is given")
    return Sizes(
        vocab=config.get_int("vocab_size", high=MAX_VOCAB),
        hidden=hidden,
        layers=config.get_int("num_hidden_layers", high=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        context=config.get_int("max_position_embeddings", context, high=MAX_CONTEXT),
    )


def read_gated_mlp(config: ConfigReader, bias: bool = False) -> MlpSpec:
    """The MLP of Llama and those like it. Raises CheckpointError, UnsupportedModel."""
    activation = config.get_choice("hidden_act", ACTIVATIONS, "silu")
    return MlpSpec(gated=True, activation=activation, intermediate=config.get_int("intermediate_size"), bias=bias)


def read_window(config: ConfigReader, default: int | None) -> int | None:
    """`sliding_window`: a null turns it off, only a missing key has the default."""
    return config.find_int("sliding_window") if "sliding_window" in config else default


def read_layer_windows(
    config: ConfigReader, layers: int, window: int | None, has_window: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where the config has them, else by the architecture's own rule."""
    kinds = config.find_choices("layer_types", ("full_attention", "sliding_attention"), layers)
    windowed = [has_window(i) for i in range(layers)] if kinds is None else [k == "sliding_attention" for k in kinds]
    if window is None and any(windowed):
        config.unsupported("sliding_window", "a window, switched on, since some layers are windowed")
    return tuple(window if flag else None for flag in windowed)
