"""Names, types, labels and buckets of /metrics.

Three sets of names show the same figures: headrace's own, vLLM's (0.32; the same suffixes behind another prefix, so
that a dashboard moves by replacing it), and TGI's. What belongs to a feature that headrace lacks has no name here:
vLLM's caches outside the process and of images, speculation, adapters, FLOP estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.core.metrics import STEP_ADMITTED, STEP_SECONDS, STEP_TOKENS

Kind = Literal["counter", "gauge", "histogram"]

TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005),  # below vLLM's first bound, which hides fast decoding
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
REQUEST_JOULES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
SKIPPED_TOKENS = (0.0,)


def token_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … ≤ `longest`."""
    return tuple(float(m * 10**e) for e in range(len(str(longest))) for m in (1, 2, 5) if m * 10**e <= longest)


def hundredths(longest: int) -> tuple[float, ...]:
    """`longest` ÷ 100 × 1 … 100."""
    return tuple(longest / 100 * (k + 1) for k in range(100))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, without its prefix."""

    kind: Kind
    help: str
    buckets: tuple[float, ...] | Callable[[int], tuple[float, ...]] = ()
    """Bounds, or what makes them from the most tokens that prompt and answer may have together."""

    def bounds(self, longest: int) -> tuple[float, ...]:
        return self.buckets(longest) if callable(self.buckets) else self.buckets


SHARED: Mapping[str, Family] = {
    "num_requests_running": Family("gauge", "Requests in the running batch."),
    "num_requests_waiting": Family("gauge", "Requests waiting to join it."),
    "num_requests_waiting_by_reason": Family("gauge", "Waiting requests, by what they wait for."),
    "kv_cache_usage_perc": Family("gauge", "Share of the KV cache that running requests hold; 1 is all of it."),
    "engine_sleep_state": Family("gauge", "awake is 1 while the engine runs."),
    "cache_config_info": Family("gauge", "The KV cache's settings, as labels."),
    "prefix_cache_queries_total": Family("counter", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits_total": Family("counter", "Prompt tokens found there."),
    "num_preemptions_total": Family("counter", "Requests put back in the queue for want of KV blocks."),
    "prompt_tokens_total": Family("counter", "Prompt tokens of answered requests."),
    "prompt_tokens_cached_total": Family("counter", "Of these, tokens that came from the prefix cache."),
    "prompt_tokens_by_source_total": Family(
        "counter", "Prompt tokens of answered requests, by where their KV came from."
    ),
    "generation_tokens_total": Family("counter", "Tokens generated."),
    "request_success_total": Family("counter", "Answers that ended without an error, by why; abort: the client left."),
    "admission_rejections_total": Family("counter", "Requests refused before any work, by why."),
    "corrupted_requests_total": Family("counter", "Requests that ended because their logits were not finite."),
    "request_prompt_tokens": Family("histogram", "Prompt tokens of a request.", token_buckets),
    "request_generation_tokens": Family("histogram", "Tokens of an answer.", token_buckets),
    "request_max_num_generation_tokens": Family(
        "histogram", "Tokens of the longest answer to a prompt.", token_buckets
    ),
    "request_params_max_tokens": Family("histogram", "max_tokens of a request, where it was given.", token_buckets),
    "request_params_n": Family("histogram", "n of a request.", CHOICES),
    "request_prefill_kv_computed_tokens": Family(
        "histogram", "Prompt tokens that were computed, not found in the prefix cache.", token_buckets
    ),
    "iteration_tokens_total": Family("histogram", "Tokens computed in a step.", STEP_TOKENS),
    "time_to_first_token_seconds": Family("histogram", "Arrival to first token.", TTFT_SECONDS),
    "inter_token_latency_seconds": Family("histogram", "Time between two tokens of an answer.", TOKEN_SECONDS),
    "request_time_per_output_token_seconds": Family(
        "histogram", "Mean time a token after the first, of an answer.", TOKEN_SECONDS
    ),
    "e2e_request_latency_seconds": Family("histogram", "Arrival to end.", REQUEST_SECONDS),
    "request_queue_time_seconds": Family(
        "histogram", "Being given to the engine to joining the batch.", REQUEST_SECONDS
    ),
    "request_inference_time_seconds": Family("histogram", "Joining the batch to end.", REQUEST_SECONDS),
    "request_prefill_time_seconds": Family("histogram", "Joining the batch to first token.", REQUEST_SECONDS),
    "request_decode_time_seconds": Family("histogram", "First token to end.", REQUEST_SECONDS),
}
"""Behind `headrace:` and `vllm:`. Labels: model_name, engine, and what is named in `ServerMetrics`."""

OWN: Mapping[str, Family] = {
    "engine_up": Family("gauge", "1 while the engine process runs; at 0 its figures are the last known ones."),
    "engine_restarts_total": Family("counter", "Times the engine process was started anew."),
    "engine_iterations_total": Family("counter", "Steps that computed at least one token."),
    "engine_computed_tokens_total": Family("counter", "Tokens computed, of prompts and answers."),
    "engine_faults_total": Family("counter", "Steps that raised an error; those who caused it ended with it."),
    "engine_block_leaks_total": Family("counter", "Times that KV blocks were missing when nobody held any."),
    "engine_step_seconds": Family("histogram", "Time of a step.", STEP_SECONDS),
    "requests_received_total": Family("counter", "Requests that were let in: one for each answer asked for."),
    "request_images_total": Family("counter", "Images of the requests that went to the engine."),
    "request_held_bytes": Family(
        "gauge", "Memory that long bodies and images of requests hold now; --max-held-mib bounds it."
    ),
    "request_errors_total": Family("counter", "Requests that ended with an error, by its code."),
}
"""Behind `headrace:` only, with the same labels."""

ENERGY: Mapping[str, Family] = {
    "energy_joules_total": Family("counter", "Energy used by the machine, by meter; estimated: from its load alone."),
    "energy_kwh_total": Family("counter", "The same in kilowatt-hours."),
    "request_energy_joules": Family(
        "histogram",
        "Energy of a request: that of each second in which it got tokens, times its share of the tokens then.",
        REQUEST_JOULES,
    ),
    "request_cost_total": Family("counter", "Energy of requests times the price of a kilowatt-hour."),
}
"""Behind `headrace:` only, where energy is metered; the cost where a price is set."""

TGI: Mapping[str, Family] = {
    "tgi_request_count": Family("counter", "Total number of requests."),
    "tgi_request_success": Family("counter", "Number of successful requests."),
    "tgi_request_failure": Family("counter", "Number of failed requests per error."),
    "tgi_request_duration": Family("histogram", "Total time of a request.", STEP_SECONDS),
    "tgi_request_validation_duration": Family("histogram", "Time spent validating a request.", STEP_SECONDS),
    "tgi_request_queue_duration": Family("histogram", "Time spent in the queue.", STEP_SECONDS),
    "tgi_request_inference_duration": Family("histogram", "Time from joining the batch to the end.", STEP_SECONDS),
    "tgi_request_mean_time_per_token_duration": Family("histogram", "Inference time a token.", STEP_SECONDS),
    "tgi_request_generated_tokens": Family("histogram", "Generated tokens per request.", hundredths),
    "tgi_request_input_length": Family("histogram", "Input token length per request.", hundredths),
    "tgi_request_max_new_tokens": Family("histogram", "Maximum new tokens per request.", hundredths),
    "tgi_request_skipped_tokens": Family("histogram", "Speculated tokens per generated one.", SKIPPED_TOKENS),
    "tgi_queue_size": Family("gauge", "Current queue size."),
    "tgi_batch_current_size": Family("gauge", "Current batch size."),
    "tgi_batch_current_max_tokens": Family("gauge", "Tokens that the batch's KV blocks can hold."),
    "tgi_batch_max_total_tokens": Family("gauge", "Tokens that all KV blocks can hold."),
    "tgi_batch_next_size": Family("histogram", "Requests that join the batch together.", STEP_ADMITTED),
    "tgi_batch_concat": Family("counter", "Joinings of two batches; 0: there is only one."),
    "tgi_batch_concat_duration": Family("histogram", "Time of these; none.", STEP_SECONDS),
    "tgi_batch_inference_count": Family("counter", "Steps; prefill: those that compute tokens of a prompt."),
    "tgi_batch_inference_success": Family("counter", "Successful ones."),
    "tgi_batch_inference_failure": Family("counter", "Failed ones: a failed step fails its requests alone."),
    "tgi_batch_inference_duration": Family("histogram", "Time of a step.", STEP_SECONDS),
    "tgi_batch_forward_duration": Family("histogram", "Time of a step.", STEP_SECONDS),
    "tgi_batch_decode_duration": Family("histogram", "Part of a step that is not told apart; none.", STEP_SECONDS),
    "tgi_batch_filter_duration": Family("histogram", "Part of a step that does not exist here; none.", STEP_SECONDS),
}
"""TGI's own names, without a prefix and without the model's labels; `method` is prefill or decode."""

TGI_FAILURES = ("overloaded", "validation", "generation", "incomplete", "template", "dropped")
"""Values of `err` in tgi_request_failure."""

OBSERVED = frozenset(
    name
    for name, family in (*SHARED.items(), *TGI.items())
    if family.kind == "histogram" and not name.startswith(("iteration_", "tgi_batch_", "tgi_request_skipped_"))
)
"""Histograms that the server itself fills; the others are the engine's."""
