"""/metrics: names, types, labels and buckets as dashboards expect them, and figures that are what happened."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from headrace.core.metrics import STEP_ADMITTED, STEP_SECONDS, STEP_TOKENS, EngineStats, Histogram, HistogramState
from headrace.engine.answer import Completion
from headrace.server.energy import Energy
from headrace.server.metric_names import ENERGY, OWN, SHARED, TGI
from headrace.server.metrics import Finished, ServerMetrics
from tests.arch.rules import REPO

ALL = ("headrace", "vllm", "tgi")

TTFT = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
FAST = "0.0005 0.001 0.002 0.005"
ITL = f"{FAST} 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TO_2048 = "1 2 5 10 20 50 100 200 500 1000 2000"
VLLM_BUCKETS = {
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": ITL,
    "request_time_per_output_token_seconds": ITL,
    "e2e_request_latency_seconds": LATENCY,
    "request_queue_time_seconds": LATENCY,
    "request_inference_time_seconds": LATENCY,
    "request_prefill_time_seconds": LATENCY,
    "request_decode_time_seconds": LATENCY,
    "request_prompt_tokens": TO_2048,
    "request_generation_tokens": TO_2048,
    "request_max_num_generation_tokens": TO_2048,
    "request_params_max_tokens": TO_2048,
    "request_prefill_kv_computed_tokens": TO_2048,
    "request_params_n": "1 2 5 10 20",
    "iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
}
VLLM_GAUGES = {
    *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
    *("engine_sleep_state", "cache_config_info"),
}
VLLM_COUNTERS = {
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached"),
    *("prompt_tokens_by_source", "generation_tokens", "request_success", "admission_rejections", "corrupted_requests"),
}
VLLM_DASHBOARD = """
vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum vllm:e2e_request_latency_seconds_count
vllm:prompt_tokens_total vllm:generation_tokens_total vllm:inter_token_latency_seconds_bucket
vllm:num_requests_running vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket vllm:kv_cache_usage_perc
vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
vllm:request_max_num_generation_tokens_sum vllm:inter_token_latency_seconds_sum
"""
"""Series of vLLM's published dashboard."""
TGI_SERIES = """
tgi_request_count tgi_request_success tgi_request_failure tgi_queue_size tgi_batch_current_size
tgi_batch_current_max_tokens tgi_batch_inference_count tgi_batch_inference_success
tgi_request_queue_duration_bucket tgi_request_generated_tokens_bucket tgi_request_generated_tokens_sum
tgi_request_generated_tokens_count tgi_request_input_length_bucket tgi_request_mean_time_per_token_duration_bucket
tgi_request_duration_bucket tgi_request_validation_duration_bucket tgi_request_inference_duration_bucket
tgi_request_max_new_tokens_bucket tgi_request_skipped_tokens_sum tgi_batch_inference_duration_bucket
tgi_batch_forward_duration_bucket tgi_batch_decode_duration_bucket tgi_batch_filter_duration_bucket
tgi_batch_next_size_bucket tgi_batch_concat tgi_batch_concat_duration_bucket
"""
"""Series of TGI's published dashboard."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Lamp:
    """A meter that takes 40 W."""

    source = "rapl"

    def __init__(self) -> None:
        self.last: float | None = None

    def joules(self, now: float) -> float:
        last, self.last = self.last, now
        return 0.0 if last is None else 40.0 * (now - last)


def state(bounds: tuple[float, ...], *values: float) -> HistogramState:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    return histogram.state()


STATS = EngineStats(
    running=3,
    waiting=2,
    blocks_used=10,
    blocks_total=40,
    block_size=16,
    iterations=5,
    computed_tokens=500,
    cached_tokens=64,
    queried_tokens=256,
    preemptions=1,
    faults=4,
    leaks=5,
    step_seconds=state(STEP_SECONDS, 0.01, 0.02, 0.03, 0.04, 0.5),
    prefill_step_seconds=state(STEP_SECONDS, 0.5),
    tokens_per_step=state(STEP_TOKENS, 1, 8, 9, 256, 256),
    admitted_per_step=state(STEP_ADMITTED, 3),
)


def busy(names: tuple[str, ...] = ALL) -> ServerMetrics:
    """A server to which a bit of everything has happened."""
    clock = Clock()
    energy = Energy([Lamp()], price_per_kwh=0.36, clock=clock)
    metrics = ServerMetrics("demo", 2048, names, {"block_size": "16", "num_gpu_blocks": "40"}, energy, clock)
    metrics.received(3)
    metrics.rejected("queue_full", 2)
    metrics.rejected("server_shutting_down")
    share = metrics.begin(100, images=2)
    metrics.first_token(0.02, share)
    metrics.tokens(1, None, share)
    metrics.tokens(1, 0.004, share)
    metrics.tokens(4, 0.04, share)
    clock.now += 1
    facts = Finished("stop", 100, 64, 6, queue_s=0.4, prefill_s=0.1, decode_s=0.05, e2e_s=0.55, max_tokens=16)
    metrics.finished(facts, share)
    metrics.answered(2, 6)
    metrics.aborted(metrics.begin(7))
    metrics.failed("nan_logits", metrics.begin(7))
    metrics.failed("invalid_parameter")
    metrics.failed("template_error")
    metrics.failed("queue_timeout")
    metrics.failed("deadline_exceeded")
    metrics.held(4096)
    metrics.engine(STATS, restarts=1)
    metrics.sample()
    return metrics


def families(text: str) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in found, f"{family.name} appears twice"
        found[family.name] = family
    return found


def series(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name of a sample, as it is written -> labels -> value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    written = set(re.findall(r"^([a-z][a-z0-9_:]*)", text, re.MULTILINE))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser gives every counter the suffix that TGI's lack.
            name = sample.name if sample.name in written else sample.name.removesuffix("_total")
            labels = tuple(sorted(sample.labels.items()))
            assert name in written
            assert labels not in found.setdefault(name, {}), f"{name}{labels} appears twice"
            found[name][labels] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    (found,) = [v for key, v in series(text)[name].items() if labels.items() <= dict(key).items()]
    return found


def bounds(family: Metric, **labels: str) -> list[float]:
    wanted = labels.items()
    buckets = [s for s in family.samples if s.name.endswith("_bucket") and wanted <= s.labels.items()]
    return [float(sample.labels["le"]) for sample in buckets]


@pytest.mark.parametrize("prefix", ["headrace", "vllm"])
def test_vllm_names_types_labels_and_buckets(prefix: str) -> None:
    found = families(busy((prefix,)).text())
    kinds: dict[str, set[str]] = {}
    for name, family in found.items():
        if name.removeprefix(f"{prefix}:") in {*SHARED, *(name.removesuffix("_total") for name in SHARED)}:
            kinds.setdefault(family.type, set()).add(name.removeprefix(f"{prefix}:"))
        for sample in family.samples:
            assert {"model_name", "engine"} <= sample.labels.keys()
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("demo", "0")
    assert kinds == {"gauge": VLLM_GAUGES, "counter": VLLM_COUNTERS, "histogram": set(VLLM_BUCKETS)}
    for name, expected in VLLM_BUCKETS.items():
        assert bounds(found[f"{prefix}:{name}"]) == [*map(float, expected.split()), math.inf], name


def test_both_prefixes_show_the_same() -> None:
    metrics = busy()
    ours, theirs = busy(("headrace",)).text(), busy(("vllm",)).text()
    shared = [line for line in ours.splitlines() if line.replace("headrace:", "vllm:") in theirs.splitlines()]
    assert "\n".join(shared).replace("headrace:", "vllm:") + "\n" == theirs
    assert series(metrics.text()).keys() == {*series(ours), *series(theirs), *series(busy(("tgi",)).text())}


def test_figures() -> None:
    text = busy().text()
    for name, expected in {
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_queries_total": 256,
        "prefix_cache_hits_total": 64,
        "num_preemptions_total": 1,
        "prompt_tokens_total": 100,
        "prompt_tokens_cached_total": 64,
        "generation_tokens_total": 6,
        "corrupted_requests_total": 1,
        "engine_up": 1,
        "engine_restarts_total": 1,
        "engine_iterations_total": 5,
        "engine_computed_tokens_total": 500,
        "engine_step_seconds_count": 5,
        "engine_faults_total": 4,
        "engine_block_leaks_total": 5,
        "requests_received_total": 3,
        "request_images_total": 2,
        "request_held_bytes": 4096,
        "time_to_first_token_seconds_sum": 0.02,
        "inter_token_latency_seconds_count": 5,
        "inter_token_latency_seconds_sum": 0.044,
        "request_time_per_output_token_seconds_sum": 0.01,
        "request_prefill_kv_computed_tokens_sum": 36,
        "request_inference_time_seconds_sum": 0.15,
        "request_queue_time_seconds_sum": 0.4,
        "e2e_request_latency_seconds_sum": 0.55,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 16,
        "request_max_num_generation_tokens_sum": 6,
        "iteration_tokens_total_count": 5,
        "iteration_tokens_total_sum": 530,
    }.items():
        assert value(text, f"headrace:{name}") == pytest.approx(expected), name
    assert value(text, "headrace:inter_token_latency_seconds_bucket", le="0.005") == 1
    assert value(text, "headrace:inter_token_latency_seconds_bucket", le="0.01") == 5
    assert value(text, "headrace:iteration_tokens_total_bucket", le="8.0") == 2
    assert value(text, "headrace:cache_config_info", block_size="16", num_gpu_blocks="40") == 1
    assert value(text, "headrace:energy_joules_total", source="rapl") == pytest.approx(40)
    assert value(text, "headrace:energy_kwh_total", source="rapl") == pytest.approx(40 / 3.6e6)
    assert value(text, "headrace:request_energy_joules_sum", source="rapl") == pytest.approx(40)
    assert value(text, "headrace:request_cost_total", source="rapl") == pytest.approx(40 / 3.6e6 * 0.36)


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("headrace:request_success_total", "finished_reason", {"stop": 1, "length": 0, "abort": 1}),
        ("headrace:admission_rejections_total", "reason", {"queue_full": 2, "server_shutting_down": 1}),
        ("headrace:num_requests_waiting_by_reason", "reason", {"capacity": 2, "deferred": 0}),
        ("headrace:engine_sleep_state", "sleep_state", {"awake": 1, "weights_offloaded": 0, "discard_all": 0}),
        (
            "headrace:prompt_tokens_by_source_total",
            "source",
            {"local_compute": 36, "local_cache_hit": 64, "external_kv_transfer": 0},
        ),
        (
            "headrace:request_errors_total",
            "code",
            {"nan_logits": 1, "invalid_parameter": 1, "template_error": 1, "queue_timeout": 1, "deadline_exceeded": 1},
        ),
        (
            "tgi_request_failure",
            "err",
            {"overloaded": 4, "validation": 1, "generation": 2, "incomplete": 0, "template": 1, "dropped": 1},
        ),
        ("tgi_batch_inference_count", "method", {"prefill": 1, "decode": 4}),
        ("tgi_batch_forward_duration_count", "method", {"prefill": 1, "decode": 4}),
    ],
)
def test_figures_by_label(name: str, label: str, expected: Mapping[str, float]) -> None:
    assert {dict(key)[label]: v for key, v in series(busy().text())[name].items()} == expected


def test_tgi_names_types_and_buckets() -> None:
    found = families(busy(("tgi",)).text())
    assert {name: family.type for name, family in found.items()} == {name: family.kind for name, family in TGI.items()}
    for name, family in found.items():
        if name.endswith("_duration"):
            labels = {"method": "decode"} if "method" in family.samples[0].labels else {}
            seconds = [0.0001 * 1.5**k for k in range(1, 36)]
            assert bounds(family, **labels) == pytest.approx([*seconds, math.inf], rel=1e-12)
    assert bounds(found["tgi_request_input_length"])[:-1] == pytest.approx([20.48 * k for k in range(1, 101)])
    text = busy(("tgi",)).text()
    assert "tgi_request_count 3.0\n" in text, "no suffix, no labels"
    assert value(text, "tgi_request_success") == 1
    assert value(text, "tgi_batch_current_max_tokens") == 160
    assert value(text, "tgi_batch_max_total_tokens") == 640
    assert value(text, "tgi_request_mean_time_per_token_duration_sum") == pytest.approx(0.025)
    assert (value(text, "tgi_request_skipped_tokens_sum"), value(text, "tgi_request_skipped_tokens_count")) == (0, 6)


def test_published_dashboards_find_their_series() -> None:
    found = series(busy().text())
    assert not {*VLLM_DASHBOARD.split(), *TGI_SERIES.split()} - found.keys()


def test_every_name_is_shown_where_it_is_asked_for() -> None:
    def shown(*names: str) -> set[str]:
        return set(re.findall(r"^# TYPE (\S+) ", busy(names).text(), re.MULTILINE))

    own = {f"headrace:{name}" for name in (*SHARED, *OWN, *ENERGY)}
    theirs = {f"vllm:{name}" for name in SHARED}
    assert shown("headrace") == own
    assert shown("vllm") == theirs
    assert shown("tgi") == set(TGI)
    assert shown(*ALL) == own | theirs | set(TGI)
    assert not shown()


def test_before_anything_happened() -> None:
    text = ServerMetrics("demo", 2048, ALL).text()
    assert value(text, "headrace:engine_up") == 0
    assert value(text, "headrace:kv_cache_usage_perc") == 0
    assert value(text, "headrace:time_to_first_token_seconds_count") == 0
    assert "energy" not in text
    assert "request_cost" not in text
    assert all(math.isfinite(v) for values in series(text).values() for v in values.values())


def test_without_a_price_there_is_no_cost() -> None:
    clock = Clock()
    text = ServerMetrics("demo", 2048, ("headrace",), energy=Energy([Lamp()], clock=clock), clock=clock).text()
    assert "energy_joules_total" in text
    assert "request_cost" not in text


def test_a_dead_engine_leaves_its_last_figures() -> None:
    metrics = busy(("headrace",))
    before = metrics.text()
    metrics.engine(None, restarts=1)
    after = metrics.text()
    changed = {line for line in after.splitlines() if line not in before.splitlines()}
    assert {line.partition("{")[0] for line in changed} == {"headrace:engine_up", "headrace:engine_sleep_state"}
    assert all(line.endswith(" 0.0") for line in changed)


def test_no_counter_falls_when_the_engine_is_started_anew() -> None:
    metrics = busy()
    before = series(metrics.text())
    metrics.engine(None, restarts=2)
    metrics.engine(EngineStats(running=1, blocks_total=40, block_size=16), restarts=2)
    fresh = series(metrics.text())
    metrics.engine(STATS, restarts=2)
    metrics.engine(STATS, restarts=2)
    after = series(metrics.text())
    kinds = {name: family.type for name, family in families(metrics.text()).items()}
    rising = [name for name, kind in kinds.items() if kind != "gauge"]
    for name in before:
        if name.startswith(tuple(rising)):
            for key in before[name]:
                assert before[name][key] <= fresh[name][key] <= after[name][key], (name, key)
    assert value(metrics.text(), "headrace:engine_iterations_total") == 10
    assert value(metrics.text(), "headrace:engine_step_seconds_sum") == pytest.approx(1.2)
    assert value(metrics.text(), "headrace:prefix_cache_queries_total") == 512
    assert value(metrics.text(), "headrace:num_requests_running") == 3, "a gauge is of now"
    metrics.engine(EngineStats(iterations=1), restarts=3)
    assert value(metrics.text(), "headrace:engine_iterations_total") == 11


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.text(max_size=10))
@example('a\\n"b"\n\\', "\\\\n}")
def test_any_label_comes_back(model: str, reason: str) -> None:
    metrics = ServerMetrics(model, 8, ("headrace",))
    metrics.rejected(reason)
    found = series(metrics.text())
    ((key, running),) = found["headrace:num_requests_running"].items()
    assert (running, dict(key)["model_name"]) == (0, model)
    reasons = {dict(key)["reason"]: v for key, v in found["headrace:admission_rejections_total"].items()}
    assert reasons[reason] >= 1


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.tuples(st.floats(-20, 20), st.integers(1, 5)), max_size=30),
)
def test_a_histogram_counts_what_lies_up_to_each_bound(limits: list[float], seen: list[tuple[float, int]]) -> None:
    histogram = Histogram(limits)
    for one, times in seen:
        histogram.observe(one, times)
    found = histogram.state()
    for index, bound in enumerate(limits):
        assert sum(found.counts[: index + 1]) == sum(times for one, times in seen if one <= bound)
    assert found.count == sum(times for _, times in seen)
    assert found.sum == pytest.approx(sum(one * times for one, times in seen), abs=1e-9)
    assert (found + HistogramState()) == found
    assert (found + found) - found == HistogramState(found.counts, pytest.approx(max(0.0, found.sum), abs=1e-9))


def test_a_name_that_is_no_text_is_shown_all_the_same() -> None:
    assert 'model_name="a?"' in ServerMetrics("a\udcff", 8).text().encode().decode()


@pytest.mark.parametrize("limits", [(), (1.0, 1.0), (2.0, 1.0)])
def test_bounds_must_rise(limits: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="bounds must rise"):
        Histogram(limits)


@pytest.mark.parametrize("longest", [1, 2, 99, 100, 2048, 131072])
def test_token_buckets_reach_to_the_longest_text(longest: int) -> None:
    found = families(ServerMetrics("demo", longest, ALL).text())
    ours = bounds(found["vllm:request_prompt_tokens"])[:-1]
    assert ours[-1] <= longest < 2.5 * ours[-1]
    assert all(high / low in (2.0, 2.5) for low, high in pairwise(ours))
    assert bounds(found["tgi_request_generated_tokens"])[-2] == pytest.approx(longest)


def test_the_phases_of_a_completion_add_up() -> None:
    done = Completion(0, 0, (1, 2, 3), (4, 5), "ab", "length", cached_tokens=2, ttft_s=0.7, latency_s=1.2)
    facts = Finished.of(done, queue_s=0.25, max_tokens=2, validation_s=0.125)
    assert (facts.reason, facts.prompt_tokens, facts.cached_tokens, facts.output_tokens) == ("length", 3, 2, 2)
    assert facts.prefill_s == pytest.approx(0.325)
    assert facts.decode_s == pytest.approx(0.5)
    assert facts.validation_s + facts.queue_s + facts.prefill_s + facts.decode_s == pytest.approx(facts.e2e_s)
    with pytest.raises(ValueError, match="has not finished"):
        Finished.of(replace(done, finish_reason=None), 0.25, None, 0.0)


def test_tokens_a_second() -> None:
    clock = Clock()
    metrics = ServerMetrics("demo", 8, clock=clock)
    assert metrics.tokens_per_s() == 0
    for _ in range(20):
        metrics.tokens(30, None)
        clock.now += 1
        metrics.sample()
    assert metrics.tokens_per_s() == pytest.approx(30)
    for _ in range(5):
        clock.now += 1
        metrics.sample()
    assert metrics.tokens_per_s() == 0


def expressions(part: Any) -> list[str]:
    """Every query of a dashboard."""
    if isinstance(part, dict):
        own = [part[key] for key in ("expr", "query") if isinstance(part.get(key), str)]
        return own + [one for below in part.values() for one in expressions(below)]
    return [one for below in part for one in expressions(below)] if isinstance(part, list) else []


def test_the_dashboard_asks_for_what_is_shown() -> None:
    dashboard = json.loads((REPO / "docs/grafana/headrace.json").read_text(encoding="utf-8"))
    queries = [text for text in expressions(dashboard) if ":" in text]
    assert len(queries) > 40
    for prefix in ("headrace", "vllm"):
        found = series(busy(("headrace", prefix)).text())
        for query in queries:
            asked = re.findall(r"(?:\$\{prefix\}|headrace):[a-z0-9_]+", query)
            assert asked, query
            for name in asked:
                assert name.replace("${prefix}", prefix) in found, name
            labels = {label for name in asked for key in found[name.replace("${prefix}", prefix)] for label, _ in key}
            assert set(re.findall(r"by \((\w+)\)", query)) <= labels, query


def test_the_dashboard_is_whole() -> None:
    """What Grafana 10 needs: its schema, distinct ids, panels that do not overlap, variables that exist."""
    text = (REPO / "docs/grafana/headrace.json").read_text(encoding="utf-8")
    dashboard = json.loads(text)
    assert dashboard["schemaVersion"] >= 38
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not mine & cells, panel["title"]
        cells |= mine
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count("(") == target["expr"].count(")")
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert known == {"datasource", "prefix", "model", "instance"}
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range", "__all"} == known


def test_bounds_are_those_of_the_step_histograms() -> None:
    assert len(STEP_SECONDS) == 35
    assert STEP_SECONDS[-1] == pytest.approx(0.0001 * 1.5**35)
    assert STEP_TOKENS == (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
