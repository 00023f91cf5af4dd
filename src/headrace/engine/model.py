"""A model opened: headers, description, tokenizer and settings, but no weights yet.

Everything that can be refused is refused here, before torch is imported and weights are read.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headrace.backends.base import Backend, BackendOptions, ReadsAhead
from headrace.core.adapters import parse_adapters
from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    HeadraceError,
    InvalidParameter,
    RequestError,
    UnsupportedParameter,
)
from headrace.core.resolve import INSTALL, check_config, resolve
from headrace.core.sizing import IMAGE_CACHE_BYTES, PLAIN_TYPES, Stored, stays_packed, stored_sizes
from headrace.core.spec import WeightMap
from headrace.core.types import Capacity, EngineLimits, Request, SamplingParams
from headrace.core.validate import validate
from headrace.engine.core import EngineCore
from headrace.engine.hardware import NEEDS, probe_hardware
from headrace.engine.images import (
    Encoded,
    ImagePrompt,
    ImageReader,
    choose_frame,
    image_parts,
    is_message_list,
    refuse_images,
)
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.text.tokenizer import Tokenizer, declared_eos_ids, has_tokenizer, load_tokenizer
from headrace.weights.checkpoint import Checkpoint, locate, open_checkpoint, read_image_processor
from headrace.weights.loader import stream
from headrace.weights.qtensor import QTensor

if TYPE_CHECKING:
    from headrace.engine.grammars import Grammars
    from headrace.text.grammar import Vocabulary
    from headrace.weights.lora import Adapter

Message = Mapping[str, object]
Prompt = str | Sequence[int] | Sequence[Message] | ImagePrompt | Encoded
"""Text (continued as it is), token ids, chat messages (put through the model's template), a text with pictures, or what
`OpenModel.encode_prompt` has made of one of these."""
OnProgress = Callable[[float], None]
"""Hears which share of the weights has been read, 0 to 1."""
SAMPLE_CHARACTERS = 16
"""For each token of the context: so much of a long text is tokenised to see whether it can be a prompt at all."""
MOST_HELD = 8 * 2**20
"""Bytes of a checkpoint's tensors that stay in memory beside those that a backend has made of them."""


def child_seed(seed: int, index: int) -> int:
    """Seed of the index-th answer of several: the first 8 bytes of SHA-256(seed, index), little-endian int64 each."""
    digest = sha256(seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def children(sampling: SamplingParams) -> tuple[SamplingParams, ...]:
    """One SamplingParams for each of the `n` answers, with a seed wherever one will be used."""
    if sampling.temperature > 0 and sampling.seed is None:
        sampling = replace(sampling, seed=int.from_bytes(os.urandom(8), "little") >> 1)
    if sampling.n == 1:
        return (sampling,)
    seeds = [None if sampling.seed is None else child_seed(sampling.seed, index) for index in range(sampling.n)]
    return tuple(replace(sampling, n=1, seed=seed) for seed in seeds)


class OpenModel:
    """What is known of a model before its weights are loaded. Raises ModelError, ConfigError or InvalidParameter."""

    def __init__(self, config: EngineConfig) -> None:
        check_config(config)
        parse_policy(config.policy)
        self.requested = config
        self.checkpoint = checkpoint = open_checkpoint(locate(config.model))
        self._frame, self._frame_wins = choose_frame(checkpoint.config, config.prompt_form)
        description = describe(
            *(checkpoint.config, checkpoint.format, checkpoint.shapes(), checkpoint.vector),
            token_id=self._token_id,
            processor=read_image_processor(checkpoint),
        )
        self.spec = description.spec
        self._weight_map = description.weight_map
        self.stored = stored_of(checkpoint, description.dtype)
        self.config: ResolvedConfig = resolve(config, self.spec, probe_hardware(), self.stored)
        self.adapters = self._read_adapters(description.adapter_map)
        self._begun: _Load | None = None
        self._begin_s = 0.0
        longest, vision = self.config.max_model_len, self.spec.vision
        self.images = None if vision is None else ImageReader(vision, config, longest)
        """Reads the pictures of prompts; None: the model reads none."""
        seen = None if self.images is None else self.images.limits
        self.limits = EngineLimits(self.spec.vocab_size, longest, frozenset(self.adapters), seen)

    def _read_adapters(self, adapter_map: WeightMap) -> Mapping[str, Adapter]:
        folders = parse_adapters(self.requested.adapters)
        if not folders:
            return {}
        from headrace.weights.lora import read_adapter

        return {name: read_adapter(name, Path(folder), self.spec, adapter_map) for name, folder in folders.items()}

    @cached_property
    def has_text(self) -> bool:
        """Whether the model comes with a tokenizer. Without one it takes and gives token ids."""
        return has_tokenizer(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the model comes without one."""
        if not self.has_text:
            where = "tokenizer.ggml.model" if self.checkpoint.format == "gguf" else "tokenizer.json"
            raise RequestError(f"this model has no tokenizer ({where} is missing): give prompt_token_ids, and no stop")
        found = load_tokenizer(self.checkpoint)
        if self._frame is not None and (self._frame_wins or found.chat_template is None):
            found.chat_template = self._frame
        return found

    def _token_id(self, text: str) -> int | None:
        """Of a token by its text."""
        found: int | None = self.tokenizer.raw.token_to_id(text) if self.has_text else None
        return found

    def vocabulary(self) -> Vocabulary:
        """Every token in bytes, for grammars. Raises RequestError if the model comes without a tokenizer."""
        from headrace.text.vocabulary import build_vocabulary

        return build_vocabulary(self.tokenizer, self.spec.vocab_size)

    def close(self) -> None:
        """Gives the files back, and ends what the tokenizer runs. Idempotent."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.backend.close()
        self.checkpoint.close()
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends an answer."""
        return self.tokenizer.eos_token_ids if self.has_text else declared_eos_ids(self.checkpoint)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt of any kind. Raises RequestError."""
        return self.encode_prompt(prompt).token_ids

    def encode_prompt(self, prompt: Prompt) -> Encoded:
        """Token ids of a prompt of any kind, and its images. Raises RequestError."""
        if isinstance(prompt, Encoded):
            return prompt
        if isinstance(prompt, ImagePrompt):
            if self.images is not None:
                return self.images.encode_prompt(prompt, self.encode_text)
            if prompt.images:
                raise UnsupportedParameter("images", f"{len(prompt.images)} images", "none: this model reads no images")
            return self.encode_prompt(prompt.prompt)
        if isinstance(prompt, str):
            return Encoded(tuple(self.encode_text(prompt)))
        allowed = "text, a list of token ids or a list of messages"
        if not isinstance(prompt, Sequence):
            raise InvalidParameter("prompt", prompt, allowed)
        if is_message_list(prompt):
            return self.encode_chat(prompt)
        for token_id in prompt:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidParameter("prompt", token_id, allowed)
        return Encoded(tuple(cast("Sequence[int]", prompt)))

    def encode_chat(self, messages: Sequence[Message], /, **variables: Any) -> Encoded:
        """Token ids of a conversation, and its images. `variables`: as in `Tokenizer.render`. Raises RequestError."""
        if self.images is None:
            refuse_images(messages)
        elif any(image_parts(messages)):
            render = partial(self.tokenizer.render, **variables)
            return self.images.encode_chat(messages, render, self.encode_text)
        return Encoded(tuple(self.encode_text(self.tokenizer.render(messages, **variables), False)))

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt's text. One that is far too long for the context is found out by its beginning: two
        megabytes take three seconds. Raises RequestError."""
        longest = self.limits.max_model_len
        if len(text) > 2 * SAMPLE_CHARACTERS * longest:
            count = len(self.tokenizer.encode(text[: SAMPLE_CHARACTERS * longest], False))
            if count > 2 * longest:
                raise ContextLengthExceeded(
                    f"this model's maximum context length is {longest} tokens, for prompt and answer together: the "
                    f"prompt has more than {count}, allowed: up to {longest - 1}"
                )
        return self.tokenizer.encode(text, add_special_tokens)

    def requests(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        arrival_s: float = 0.0,
        adapter: str = "",
    ) -> tuple[Request, ...]:
        """The prompt as validated requests, one for each of its `n` answers; the ids of several get `/0`, `/1` …

        `adapter`: empty: the model itself. Draws a seed where one will be used and none was given. Raises RequestError.
        """
        encoded = self.encode_prompt(prompt)
        if sampling.stop and not self.has_text:
            raise InvalidParameter("stop", sampling.stop, "stop_token_ids, since this model has no tokenizer")
        if sampling.bad_words:
            sampling = replace(sampling, bad_words_ids=(*sampling.bad_words_ids, *self._bad_words_ids(sampling)))
        each = children(sampling)
        ids = [request_id] if len(each) == 1 else [f"{request_id}/{i}" for i in range(len(each))]
        if not isinstance(adapter, str):
            raise InvalidParameter("adapter", adapter, "a name")
        found = tuple(
            Request(i, encoded.token_ids, one, encoded.images, adapter, arrival_s=arrival_s)
            for i, one in zip(ids, each, strict=True)
        )
        validate(found[0], self.limits)
        return found

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        arrival_s: float = 0.0,
        adapter: str = "",
    ) -> Request:
        """The prompt as one validated request. Raises RequestError, also where several answers are asked for."""
        if sampling.n != 1:
            raise InvalidParameter("n", sampling.n, "1, one answer")
        return self.requests(request_id, prompt, sampling, arrival_s, adapter)[0]

    def _bad_words_ids(self, sampling: SamplingParams) -> Iterator[tuple[int, ...]]:
        """Each text as it is encoded at the start of an answer, and after a space."""
        if not self.has_text:
            raise InvalidParameter("bad_words", sampling.bad_words, "bad_words_ids, since this model has no tokenizer")
        for text in sampling.bad_words:
            bare = text.removeprefix(" ")
            forms = dict.fromkeys(
                tuple(self.tokenizer.encode(form, False)) for form in (text, bare, " " + bare) if form
            )
            if not all(forms):
                raise InvalidParameter("bad_words", text, "texts of at least one token")
            yield from forms

    def begin(self) -> None:
        """Starts to load, where that goes on by itself while prompts are looked at. `start` says what is wrong."""
        # To import torch takes seconds, and a bad prompt is to be refused at once.
        if self._begun is not None or self.config.backend == "torch":
            return
        began = time.monotonic()
        with suppress(HeadraceError):
            _ = self._fingerprint  # before there are weights
            load = self._make_load(self.config.backend, self.options())
            if isinstance(load.backend, ReadsAhead):
                load.backend.begin(self.spec, load.tensors, load.options, Mesh())
                self._begun = load
        self._begin_s = time.monotonic() - began

    def start(
        self,
        on_progress: OnProgress | None = None,
        *,
        eos_token_ids: frozenset[int] | None = None,
        step_seconds: float | None = None,
        grammars: Grammars | None = None,
        on_fault: Callable[[BaseException], None] = lambda error: None,
    ) -> tuple[EngineCore, float]:
        """Loads the weights. Returns the engine and the seconds that it, and `begin`, took.

        `eos_token_ids`: where they are known already, no tokenizer is read for them. `step_seconds`: how long a step
        should take at most; None: as long as it is fastest. `grammars`: None: requests with one are refused.
        `on_fault` hears of each exception that a step raised. Raises ModelError or EngineError.
        """
        began = time.monotonic()
        _ = self._fingerprint  # before there are weights
        backend, capacity = self.load_backend(self.config.backend, self.options(), on_progress)
        core = self.engine(
            backend,
            capacity,
            eos_token_ids=eos_token_ids,
            step_seconds=step_seconds,
            grammars=grammars,
            on_fault=on_fault,
        )
        return core, time.monotonic() - began + self._begin_s

    def engine(
        self,
        backend: Backend,
        capacity: Capacity,
        *,
        clock: Callable[[], float] = time.monotonic,
        eos_token_ids: frozenset[int] | None = None,
        step_seconds: float | None = None,
        grammars: Grammars | None = None,
        on_fault: Callable[[BaseException], None] = lambda error: None,
    ) -> EngineCore:
        """An engine on a backend that was loaded with `options()`. Arguments as in `start`."""
        config = self.config
        arithmetic = f"{config.backend}/{config.dtype}/{config.quant}/{config.kv_dtype}"
        identity = f"{self._fingerprint}/{arithmetic}"
        cache = PrefixCache(capacity.blocks, capacity.block_size, identity, config.prefix_cache)
        policy = parse_policy(config.policy)
        eos_ids = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        scheduler = Scheduler(capacity, config.max_model_len, eos_ids, policy, cache, step_seconds)
        return EngineCore(backend, scheduler, self.limits, clock, grammars=grammars, on_fault=on_fault)

    def load_backend(
        self, name: str, options: BackendOptions, on_progress: OnProgress | None = None
    ) -> tuple[Backend, Capacity]:
        """A backend of its own with this model's weights and adapters. Raises ModelError or EngineError."""
        load, self._begun = self._begun, None
        if load is None or (load.name, load.options) != (name, options):
            load = self._make_load(name, options)
        load.on_progress = on_progress
        try:
            capacity = load.backend.load(self.spec, load.tensors, options, Mesh())
            for adapter in self.adapters.values():
                load.backend.load_adapter(adapter)
            return load.backend, capacity
        except BaseException:
            load.backend.close()
            raise

    @cached_property
    def _fingerprint(self) -> str:
        found = self.checkpoint.fingerprint()
        # It has touched every tensor; what that took is not to lie beside the weights.
        self.checkpoint.drop_pages()
        return found

    def options(self) -> BackendOptions:
        """Of the backend that `start` loads."""
        config = self.config
        return BackendOptions(
            dtype=config.dtype,
            quant=config.quant,
            kv_dtype=config.kv_dtype,
            threads=config.threads,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            max_rows=config.max_num_seqs,
            max_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            # Who keeps nothing of one request for the next keeps no images either.
            image_cache_bytes=IMAGE_CACHE_BYTES if self.spec.vision is not None and config.prefix_cache else 0,
            batch_invariant=config.batch_invariant,
            device=config.device,
        )

    def _make_load(self, name: str, options: BackendOptions) -> _Load:
        # Names and shapes are compared here, before a backend is imported.
        tensors = stream(self.checkpoint, self._weight_map)
        backend = create_backend(name, self.config.instruction_set, options.device)
        return _Load(name, options, backend, self.checkpoint, tensors)


def stored_of(checkpoint: Checkpoint, dtype: str | None) -> Stored:
    """What a checkpoint holds. `dtype`: what its config says of its plain numbers."""
    numbers = {name: math.prod(shape) for name, shape in checkpoint.shapes().items()}
    if checkpoint.format == "gguf":
        schemes = {name: checkpoint.tensor(name).scheme for name in numbers}
        if not checkpoint.is_packed:
            dtype = PLAIN_TYPES.get(schemes[max(numbers, key=lambda name: numbers[name])])
        return Stored(checkpoint.is_packed, dtype, *stored_sizes(numbers, schemes))
    kept = stays_packed(checkpoint.config.get("quantization_config"))
    return Stored(checkpoint.is_packed, dtype, *((checkpoint.nbytes, 0) if kept else (0, sum(numbers.values()))))


class _Load:
    """A load before its end: the backend, and the tensors that it has not taken yet."""

    def __init__(
        self,
        name: str,
        options: BackendOptions,
        backend: Backend,
        checkpoint: Checkpoint,
        tensors: Iterable[tuple[str, QTensor]],
    ) -> None:
        self.name = name
        self.options = options
        self.backend = backend
        self.on_progress: OnProgress | None = None
        self.tensors = self._counted(checkpoint, tensors)

    def _counted(self, checkpoint: Checkpoint, tensors: Iterable[tuple[str, QTensor]]) -> Iterator[tuple[str, QTensor]]:
        """The same tensors; each is reported once the backend has taken it, and the memory of the files is given
        back."""
        done_bytes = held_bytes = 0
        for name, tensor in tensors:
            yield name, tensor
            done_bytes += tensor.nbytes
            held_bytes += tensor.nbytes
            if held_bytes >= MOST_HELD:
                checkpoint.drop_pages()
                held_bytes = 0
            if self.on_progress is not None:
                self.on_progress(min(1.0, done_bytes / max(1, checkpoint.nbytes)))
        checkpoint.drop_pages()


def create_backend(name: str, instruction_set: str = "auto", device: str = "cpu") -> Backend:
    """An unloaded backend. `device`: where the torch backend runs, cpu or cuda.

    Raises BackendUnavailable if what it needs is not installed, ConfigError for kernels that this machine does not run.
    """
    if name == "native":
        if find_spec(NEEDS[name]) is None:
            raise BackendUnavailable(f"backend native: its kernels were not built: {INSTALL[name]}")
        try:
            from headrace.backends.native.backend import NativeBackend
        except ImportError as error:
            if error.name is None or not NEEDS[name].endswith(error.name):
                raise
            raise BackendUnavailable(
                f"backend native: its kernels cannot be loaded ({error.msg}): {INSTALL[name]}"
            ) from error
        return NativeBackend(None if instruction_set == "auto" else instruction_set)
    try:
        if device == "cuda":
            from headrace.backends.torch.gpu.backend import GpuBackend

            return GpuBackend()
        from headrace.backends.torch.backend import TorchBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("torch", "triton"):
            raise
        raise BackendUnavailable(f"backend torch needs the {error.name} package: {INSTALL[name]}") from error
    return TorchBackend()
