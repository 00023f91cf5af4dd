"""What code written for Hugging Face models says of loading and generating, in headrace's words.

Each name is honoured or refused; those that can change nothing here are taken where they say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.core.config import DTYPES, EngineConfig
from headrace.core.errors import InvalidParameter, UnsupportedParameter
from headrace.core.types import MAX_INT, SamplingParams

NEW_TOKENS = 20
"""Of an answer where `max_new_tokens` is not given: what transformers makes then."""
TOP_K = 50
"""Where `do_sample` is true and `top_k` is not given, as in transformers."""
_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "bad_words_ids")
"""Called the same, and meaning the same, in SamplingParams."""
_HONOURED = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", *_SAMPLING, "eos_token_id", "pad_token_id")
_NEUTRAL: Mapping[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "use_cache": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": False,
    "return_dict_in_generate": False,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}
"""Name -> the one value that asks for nothing (None does not either)."""
_WITHOUT_EFFECT = frozenset({"bos_token_id", "transformers_version", "_from_model_config"})
"""A prompt is always there, and says itself how it begins."""


class Generation:
    """How to generate, as a `generation_config` and more arguments say it.

    `generation_config`: a dict, an object with `to_dict` as transformers' GenerationConfig, or None; `more` wins over
    it. Greedy unless `do_sample`; temperature, top_k, top_p, min_p and typical_p then say nothing, as in transformers.
    `repetition_penalty` counts the prompt's ids and the answer's. With `do_sample` each call draws anew, whatever seed
    torch was given. Raises InvalidParameter for a value that cannot be, UnsupportedParameter for a name, or a value of
    it, that is not carried out.
    """

    def __init__(self, generation_config: object = None, more: Mapping[str, object] | None = None) -> None:
        given = {**_as_dict(generation_config), **(more or {})}
        self._given = {name: value for name, value in given.items() if value is not None}
        for name, value in self._given.items():
            if name in _NEUTRAL:
                if type(value) is not type(_NEUTRAL[name]) or value != _NEUTRAL[name]:
                    raise UnsupportedParameter(name, value, repr(_NEUTRAL[name]))
            elif name not in _HONOURED and name not in _WITHOUT_EFFECT:
                raise UnsupportedParameter(name, value, ", ".join((*_HONOURED, *_NEUTRAL)))
        self.pad_token_id: int | None = self._token("pad_token_id")
        """Fills up rows that are shorter than the longest."""
        self._eos = self._eos_token_ids()

    def sampling(self, ends: Sequence[int] = ()) -> SamplingParams:
        """`ends`: ids that end an answer beside `eos_token_id`, or beside the model's own where that is not given."""
        given = self._given
        longest = self._count("max_new_tokens", NEW_TOKENS, 1)
        shortest = self._count("min_new_tokens", 0, 0)
        if shortest > longest:
            raise InvalidParameter("min_new_tokens", shortest, f"up to max_new_tokens, {longest}")
        draws = given.get("do_sample", False)
        if not isinstance(draws, bool):
            raise InvalidParameter("do_sample", draws, "true or false")
        fields: dict[str, Any] = {name: given[name] for name in _SAMPLING if name in given}
        temperature = given.get("temperature", 1.0)
        SamplingParams(temperature=temperature)  # type: ignore[arg-type]
        if draws:
            if temperature == 0:
                raise InvalidParameter("temperature", temperature, "above 0 where do_sample is true")
            fields = {"top_k": TOP_K, **fields, "temperature": temperature}
        return SamplingParams(
            max_tokens=longest,
            min_tokens=shortest,
            ignore_eos=self._eos is not None,
            stop_token_ids=tuple(dict.fromkeys((*(self._eos or ()), *ends))),
            **fields,
        )

    def _count(self, name: str, default: int, low: int) -> int:
        value = self._given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INT:
            raise InvalidParameter(name, value, f"an integer ≥ {low}")
        return value

    def _token(self, name: str) -> int | None:
        return self._count(name, 0, 0) if name in self._given else None

    def _eos_token_ids(self) -> tuple[int, ...] | None:
        value = self._given.get("eos_token_id")
        if value is None:
            return None
        ids = value if isinstance(value, list | tuple) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MAX_INT:
                raise InvalidParameter("eos_token_id", value, "a token id or a list of them")
        return tuple(ids)


def _as_dict(config: object) -> Mapping[str, object]:
    """What differs from transformers' own defaults, where the object can tell."""
    if config is None:
        return {}
    for method in ("to_diff_dict", "to_dict"):
        if callable(make := getattr(config, method, None)):
            config = make()
            break
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise InvalidParameter("generation_config", config, "a dict, a GenerationConfig or None")
    return config


# ---------------------------------------------------------------- from_pretrained


def engine_config(path: object, arguments: Mapping[str, object]) -> EngineConfig:
    """Settings for `from_pretrained(path, **arguments)`: those of `EngineConfig` by name, and these of transformers.

    `torch_dtype`, `dtype`: a torch dtype, its name or "auto": the type of weights and arithmetic. `revision`: commit,
    branch or tag of a Hub id. `device_map`: None, "auto", or a map onto one device; which device that is, the backend
    says. `trust_remote_code`: true or false: no code of a checkpoint is ever run, and none is needed.
    `low_cpu_mem_usage`: true or false: weights are mapped from the file, not held twice. `use_flash_attn`: true or
    false: the backend has its own attention. `use_safetensors`: true. `load_in_8bit`, `load_in_4bit`: false.

    Raises InvalidParameter, UnsupportedParameter.
    """
    if isinstance(path, Path):
        path = str(path)
    if not isinstance(path, str):
        raise InvalidParameter("pretrained_model_name_or_path", path, "a folder or a Hub id")
    settings: dict[str, Any] = {}
    own = [name for name in EngineConfig.__dataclass_fields__ if name != "model"]
    for name, value in arguments.items():
        if name in ("dtype", "torch_dtype"):
            if settings.setdefault("dtype", _dtype(name, value)) != _dtype(name, value):
                raise InvalidParameter("torch_dtype", value, "what dtype says, or none")
        elif name == "revision":
            path = _at_revision(path, value)
        elif name in _LOADING:
            allowed, fits = _LOADING[name]
            if value is not None and not fits(value):
                raise UnsupportedParameter(name, value, allowed)
        elif name in own:
            settings[name] = value
        else:
            known = ("torch_dtype", "revision", *_LOADING, *own)
            raise UnsupportedParameter(name, value, ", ".join(known))
    return EngineConfig(model=path, **settings)


def _dtype(name: str, value: object) -> str:
    """`torch.bfloat16` is an object that prints as its name."""
    text = "auto" if value is None else str(value).removeprefix("torch.")
    if text not in DTYPES:
        raise InvalidParameter(name, value, ", ".join(DTYPES))
    return text


def _at_revision(path: str, value: object) -> str:
    if value is None:
        return path
    if not isinstance(value, str) or not value:
        raise InvalidParameter("revision", value, "a commit, a branch or a tag")
    if Path(path).exists():
        raise InvalidParameter("revision", value, "none for a folder, only for a Hub id")
    return f"{path}@{value}"


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _one_device(value: object) -> bool:
    return value == "auto" or (isinstance(value, Mapping) and len({str(device) for device in value.values()}) == 1)


_BOOL: tuple[str, Callable[[object], bool]] = ("true or false", _is_bool)
_NO: tuple[str, Callable[[object], bool]] = ("false; see quant for weights of fewer bits", lambda value: value is False)
_LOADING: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "device_map": ('"auto", or a map onto one device: a model is not dealt out over several', _one_device),
    "low_cpu_mem_usage": _BOOL,
    "use_flash_attn": _BOOL,
    "trust_remote_code": _BOOL,
    "use_safetensors": ("true, the only form that is read", lambda value: value is True),
    "load_in_8bit": _NO,
    "load_in_4bit": _NO,
}
"""Name -> (allowed values, whether one is among them); they change neither settings nor answers."""
