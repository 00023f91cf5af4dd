"""What /metrics shows: figures of the server's own, the engine's, and the meters', in Prometheus's text format.

Events are plain method calls of a microsecond; text is made when it is asked for. All belongs to one `ServerMetrics`:
there is no registry of the process. The histograms are our own because the same figures appear under several names, and
because TGI's counters lack the suffix `_total`, which prometheus_client always adds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from types import MappingProxyType

from headrace.core.errors import (
    ClientGone,
    DeadlineExceeded,
    HeadraceError,
    NonFiniteLogits,
    QueueTimeout,
    RequestError,
    TemplateError,
    Unavailable,
)
from headrace.core.metrics import EngineStats, Histogram, HistogramState
from headrace.engine.answer import Completion
from headrace.engine.energy import JOULES_PER_KWH
from headrace.server.energy import Energy, Share
from headrace.server.metric_names import ENERGY, OBSERVED, OWN, SHARED, TGI, TGI_FAILURES, Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

RATE_SAMPLES = 5
"""Calls of `sample` that `tokens_per_s` looks back on."""

Sample = tuple[Mapping[str, str], float | HistogramState]
Samples = Iterator[tuple[str, list[Sample]]]
NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Finished:
    """One answer that came to its end. Times in seconds."""

    reason: str
    """stop or length."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float
    """Being given to the engine to joining the batch."""
    prefill_s: float
    """Joining the batch to first token."""
    decode_s: float
    """First token to end."""
    e2e_s: float
    """Arrival to end."""
    max_tokens: int | None = None
    """As asked for; None: not given."""
    validation_s: float = 0.0
    """Arrival to being given to the engine: checks, template, tokenising."""

    @classmethod
    def of(cls, completion: Completion, queue_s: float, max_tokens: int | None, validation_s: float = 0.0) -> Finished:
        """From a completion without an error, whose times begin with its arrival. Raises ValueError for another."""
        if completion.finish_reason is None or completion.latency_s is None:
            raise ValueError("a completion with an error has not finished")
        first_s = completion.latency_s if completion.ttft_s is None else completion.ttft_s
        return cls(
            reason=completion.finish_reason,
            prompt_tokens=len(completion.prompt_token_ids),
            cached_tokens=completion.cached_tokens,
            output_tokens=len(completion.token_ids),
            queue_s=queue_s,
            prefill_s=max(0.0, first_s - validation_s - queue_s),
            decode_s=completion.latency_s - first_s,
            e2e_s=completion.latency_s,
            max_tokens=max_tokens,
            validation_s=validation_s,
        )


class ServerMetrics:
    """One server's figures. A request here is one answer to one prompt: a body with n = 4 and two prompts counts 8."""

    def __init__(
        self,
        model: str,
        max_model_len: int,
        names: Sequence[str] = ("headrace",),
        cache_info: Mapping[str, str] = NO_LABELS,
        energy: Energy | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`names`: metrics_as of ServeConfig. `cache_info`: the KV cache's settings, shown as labels (vLLM's readers
        look for block_size and num_gpu_blocks)."""
        self._labels = {"model_name": model, "engine": "0"}
        self._max_model_len = max_model_len
        self._names = frozenset(names)
        self._cache_info = dict(cache_info)
        self._energy = energy
        self._clock = clock
        self._up = False
        self._restarts = 0
        self._now = EngineStats()
        self._past = EngineStats()
        self._received = 0
        self._images = 0
        self._held_bytes = 0
        self._generated = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._corrupted = 0
        self._reasons: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self._rejections: Counter[str] = Counter({"queue_full": 0})
        self._errors: Counter[str] = Counter()
        self._failures: Counter[str] = Counter(dict.fromkeys(TGI_FAILURES, 0))
        self._histograms = {
            name: Histogram(family.bounds(max_model_len))
            for name, family in (*SHARED.items(), *TGI.items())
            if name in OBSERVED
        }
        self._ttft = self._histograms["time_to_first_token_seconds"]
        self._itl = self._histograms["inter_token_latency_seconds"]
        self._tgi_words = _tgi_words()
        self._rate: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=RATE_SAMPLES + 1)

    # ------------------------------------------------------------ events

    def received(self, requests: int = 1) -> None:
        """A body that asks for this many answers was let in; those `rejected` are not among them."""
        self._received += requests

    def rejected(self, reason: str, requests: int = 1) -> None:
        """They were refused before any work: queue_full, server_shutting_down, not_ready …"""
        self._rejections[reason] += requests
        self._failures["overloaded"] += requests

    def begin(self, prompt_tokens: int, images: int = 0) -> Share | None:
        """A request goes to the engine; give what this returns to the methods below. None where nothing is metered.
        `images`: how many its prompt has."""
        self._images += images
        return None if self._energy is None else self._energy.begin(prompt_tokens)

    def first_token(self, seconds: float, share: Share | None = None) -> None:
        """`seconds` from arrival. The token itself is told to `tokens`."""
        self._ttft.observe(seconds)
        if share is not None:
            share.tokens += share.prompt_tokens

    def tokens(self, n: int, gap_s: float | None, share: Share | None = None) -> None:
        """`n` ≥ 1 tokens of one answer came, `gap_s` seconds after those before them; None: they are the first."""
        self._generated += n
        if gap_s is not None:
            self._itl.observe(gap_s / n, n)
        if share is not None:
            share.tokens += n

    def finished(self, facts: Finished, share: Share | None = None) -> None:
        """An answer is complete."""
        self._end(share)
        self._reasons[facts.reason] += 1
        self._prompt_tokens += facts.prompt_tokens
        self._cached_tokens += facts.cached_tokens
        inference_s = facts.prefill_s + facts.decode_s
        seen = {
            "request_prompt_tokens": facts.prompt_tokens,
            "request_generation_tokens": facts.output_tokens,
            "request_params_max_tokens": facts.max_tokens,
            "request_prefill_kv_computed_tokens": facts.prompt_tokens - facts.cached_tokens,
            "request_time_per_output_token_seconds": (
                facts.decode_s / (facts.output_tokens - 1) if facts.output_tokens > 1 else None
            ),
            "e2e_request_latency_seconds": facts.e2e_s,
            "request_queue_time_seconds": facts.queue_s,
            "request_inference_time_seconds": inference_s,
            "request_prefill_time_seconds": facts.prefill_s,
            "request_decode_time_seconds": facts.decode_s,
            "tgi_request_duration": facts.e2e_s,
            "tgi_request_validation_duration": facts.validation_s,
            "tgi_request_queue_duration": facts.queue_s,
            "tgi_request_inference_duration": inference_s,
            "tgi_request_mean_time_per_token_duration": (
                inference_s / facts.output_tokens if facts.output_tokens else None
            ),
            "tgi_request_generated_tokens": facts.output_tokens,
            "tgi_request_input_length": facts.prompt_tokens,
            "tgi_request_max_new_tokens": facts.max_tokens,
        }
        for name, value in seen.items():
            if value is not None:
                self._histograms[name].observe(max(0, value))

    def answered(self, n: int, longest: int) -> None:
        """All `n` answers to one prompt are complete, the longest of `longest` tokens."""
        self._histograms["request_params_n"].observe(n)
        self._histograms["request_max_num_generation_tokens"].observe(longest)

    def aborted(self, share: Share | None = None) -> None:
        """The client left before the end."""
        self._end(share)
        self._reasons["abort"] += 1
        self._failures["dropped"] += 1

    def failed(self, code: str, share: Share | None = None) -> None:
        """A request ended with an error: one of a body that was not valid, or one that the engine had begun."""
        self._end(share)
        self._errors[code] += 1
        self._corrupted += code == NonFiniteLogits.code
        self._failures[self._tgi_words.get(code, "generation")] += 1

    def _end(self, share: Share | None) -> None:
        if share is not None and self._energy is not None:
            self._energy.end(share)

    @property
    def ended(self) -> int:
        """Requests that ended in any way."""
        return sum(self._reasons.values()) + sum(self._errors.values())

    # ------------------------------------------------------------ figures of others

    def held(self, num_bytes: int) -> None:
        """What long bodies and images hold at this moment. To be called before `text`."""
        self._held_bytes = num_bytes

    def engine(self, stats: EngineStats | None, restarts: int = 0) -> None:
        """The engine's newest figures, None while it does not run; how often it was started anew. To be called before
        `text`, and once a second, so that little is lost if it ends."""
        self._up = stats is not None
        self._restarts = restarts
        if stats is None:
            return
        if stats.iterations < self._now.iterations:  # another engine: its totals begin at 0, those shown go on
            self._past = self._now.after(self._past)
        self._now = stats

    def sample(self) -> None:
        """To be called once a second: reads the meters."""
        self._rate.append((self._clock(), self._generated))
        if self._energy is not None:
            self._energy.sample()

    def tokens_per_s(self) -> float:
        """Tokens generated a second, over the last RATE_SAMPLES samples."""
        then_s, then = self._rate[0]
        seconds = self._clock() - then_s
        return (self._generated - then) / seconds if seconds > 0 else 0.0

    # ------------------------------------------------------------ text

    def text(self) -> str:
        """All metrics, in the text format 0.0.4 (CONTENT_TYPE)."""
        stats = self._now.after(self._past)
        lines: list[str] = []
        for prefix in ("headrace", "vllm"):
            if prefix in self._names:
                self._write(lines, SHARED, f"{prefix}:", self._shared(stats), self._labels)
        if "headrace" in self._names:
            self._write(lines, OWN, "headrace:", self._own(stats), self._labels)
            self._write(lines, ENERGY, "headrace:", self._joules(), self._labels)
        if "tgi" in self._names:
            self._write(lines, TGI, "", self._tgi(stats), NO_LABELS)
        return "\n".join((*lines, ""))

    def _write(
        self, lines: list[str], table: Mapping[str, Family], prefix: str, samples: Samples, labels: Mapping[str, str]
    ) -> None:
        for name, values in samples:
            family = table[name]
            lines.append(f"# HELP {prefix}{name} {family.help}")
            lines.append(f"# TYPE {prefix}{name} {family.kind}")
            bounds = family.bounds(self._max_model_len)
            for extra, value in values:
                text = ",".join(f'{key}="{_escaped(label)}"' for key, label in {**labels, **extra}.items())
                if isinstance(value, HistogramState):
                    lines.extend(_histogram(prefix + name, text, bounds, value))
                else:
                    lines.append(_line(prefix + name, text, value))

    def _observed(self, table: Mapping[str, Family]) -> Samples:
        for name in table:
            if name in self._histograms:
                yield name, [(NO_LABELS, self._histograms[name].state())]

    def _shared(self, stats: EngineStats) -> Samples:
        yield "num_requests_running", _one(stats.running)
        yield "num_requests_waiting", _one(stats.waiting)
        yield "num_requests_waiting_by_reason", _by("reason", {"capacity": stats.waiting, "deferred": 0})
        yield "kv_cache_usage_perc", _one(stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        yield "engine_sleep_state", _by("sleep_state", {"awake": self._up, "weights_offloaded": 0, "discard_all": 0})
        yield "cache_config_info", [(self._cache_info, 1)]
        yield "prefix_cache_queries_total", _one(stats.queried_tokens)
        yield "prefix_cache_hits_total", _one(stats.cached_tokens)
        yield "num_preemptions_total", _one(stats.preemptions)
        yield "prompt_tokens_total", _one(self._prompt_tokens)
        yield "prompt_tokens_cached_total", _one(self._cached_tokens)
        computed = self._prompt_tokens - self._cached_tokens
        by_source = {"local_compute": computed, "local_cache_hit": self._cached_tokens, "external_kv_transfer": 0}
        yield "prompt_tokens_by_source_total", _by("source", by_source)
        yield "generation_tokens_total", _one(self._generated)
        yield "request_success_total", _by("finished_reason", self._reasons)
        yield "admission_rejections_total", _by("reason", self._rejections)
        yield "corrupted_requests_total", _one(self._corrupted)
        yield "iteration_tokens_total", [(NO_LABELS, stats.tokens_per_step)]
        yield from self._observed(SHARED)

    def _own(self, stats: EngineStats) -> Samples:
        yield "engine_up", _one(self._up)
        yield "engine_restarts_total", _one(self._restarts)
        yield "engine_iterations_total", _one(stats.iterations)
        yield "engine_computed_tokens_total", _one(stats.computed_tokens)
        yield "engine_faults_total", _one(stats.faults)
        yield "engine_block_leaks_total", _one(stats.leaks)
        yield "engine_step_seconds", [(NO_LABELS, stats.step_seconds)]
        yield "requests_received_total", _one(self._received)
        yield "request_images_total", _one(self._images)
        yield "request_held_bytes", _one(self._held_bytes)
        yield "request_errors_total", _by("code", self._errors)

    def _joules(self) -> Samples:
        energy = self._energy
        if energy is None:
            return
        yield "energy_joules_total", _by("source", energy.totals)
        yield "energy_kwh_total", _by("source", {k: joules / JOULES_PER_KWH for k, joules in energy.totals.items()})
        source = {"source": energy.source}
        yield "request_energy_joules", [(source, energy.requests)]
        if energy.price_per_kwh:
            yield "request_cost_total", [(source, energy.cost)]

    def _tgi(self, stats: EngineStats) -> Samples:
        yield "tgi_request_count", _one(self._received)
        yield "tgi_request_success", _one(sum(n for reason, n in self._reasons.items() if reason != "abort"))
        yield "tgi_request_failure", _by("err", self._failures)
        yield "tgi_queue_size", _one(stats.waiting)
        yield "tgi_batch_current_size", _one(stats.running)
        yield "tgi_batch_current_max_tokens", _one(stats.blocks_used * stats.block_size)
        yield "tgi_batch_max_total_tokens", _one(stats.blocks_total * stats.block_size)
        yield "tgi_request_skipped_tokens", [(NO_LABELS, HistogramState((self._generated, 0)))]
        yield "tgi_batch_next_size", [(NO_LABELS, stats.admitted_per_step)]
        yield "tgi_batch_concat", _by("reason", {"backpressure": 0, "wait_exceeded": 0})
        yield "tgi_batch_concat_duration", [(NO_LABELS, HistogramState())]
        prefill, none = stats.prefill_step_seconds, HistogramState()
        steps = {"prefill": prefill, "decode": stats.step_seconds - prefill}
        counts = {method: state.count for method, state in steps.items()}
        yield "tgi_batch_inference_count", _by("method", counts)
        yield "tgi_batch_inference_success", _by("method", counts)
        yield "tgi_batch_inference_failure", _by("method", dict.fromkeys(counts, 0))
        for name in ("tgi_batch_inference_duration", "tgi_batch_forward_duration"):
            yield name, [({"method": method}, state) for method, state in steps.items()]
        for name in ("tgi_batch_decode_duration", "tgi_batch_filter_duration"):
            yield name, [({"method": method}, none) for method in steps]
        yield from self._observed(TGI)


def _codes(kind: type[HeadraceError]) -> Iterator[str]:
    yield kind.code
    for below in kind.__subclasses__():
        yield from _codes(below)


def _tgi_words() -> dict[str, str]:
    """An error's code -> TGI's word for it; `generation` for all others."""
    words = dict.fromkeys(_codes(RequestError), "validation") | dict.fromkeys(_codes(Unavailable), "overloaded")
    return words | {
        TemplateError.code: "template",
        QueueTimeout.code: "overloaded",
        DeadlineExceeded.code: "generation",
        ClientGone.code: "dropped",
    }


def _one(value: float) -> list[Sample]:
    return [(NO_LABELS, value)]


def _by(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [({label: key}, value) for key, value in values.items()]


def _escaped(label: str) -> str:
    readable = label.encode("utf-8", "replace").decode()  # of a name from the command line it may not be
    return readable.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _line(name: str, labels: str, value: float) -> str:
    return f"{name}{{{labels}}} {float(value)!r}" if labels else f"{name} {float(value)!r}"


def _histogram(name: str, labels: str, bounds: Iterable[float], state: HistogramState) -> Iterator[str]:
    """Buckets are cumulative on the wire."""
    counts, so_far = iter(state.counts), 0
    separator = "," if labels else ""
    for bound in (*map(float, bounds), "+Inf"):
        so_far += next(counts, 0)
        yield f'{name}_bucket{{{labels}{separator}le="{bound}"}} {float(so_far)!r}'
    yield _line(f"{name}_count", labels, so_far)
    yield _line(f"{name}_sum", labels, state.sum)
