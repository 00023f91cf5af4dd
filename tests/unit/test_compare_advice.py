"""The recommendation: what is chosen by which objective, why, what was second, what would change it, and the flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from headrace.cli.serve import add_arguments
from headrace.compare.advice import (
    Advice,
    advice_of,
    advise,
    claim_text,
    measured_text,
    quality_gate,
    rule_text,
    serve_command,
)
from headrace.compare.figures import Prices, Slo, figures_of
from headrace.compare.measure import Claim, time_method
from headrace.compare.methods import Outcome, RequestRun
from headrace.compare.runner import Comparison, MethodResult, Wishes
from headrace.compare.verdict import SameModel
from headrace.core.errors import InvalidParameter
from tests.unit.compare_cases import OUTPUTS, comparison, outcome

WRONG = ((5, 6, 7, 8), (9, 10, 12))
SLOW, FAST = [3.0, 3.1, 3.2], [1.0, 1.1, 1.0]


def rounds(
    seconds: Sequence[float], outputs: Sequence[tuple[int, ...]] = OUTPUTS, **more: object
) -> tuple[Outcome, ...]:
    return tuple(replace(outcome(outputs, value), **more) for value in seconds)


def planted(
    runs: Mapping[str, tuple[Outcome, ...]], inexact: Sequence[str] = (), quality: SameModel | None = None
) -> Comparison:
    """`inexact`: methods that do not promise the base's tokens, with that quality."""
    found = comparison(runs)
    methods = tuple(
        replace(one, exact=False, same_model=quality or one.same_model) if one.name in inexact else one
        for one in found.methods
    )
    return replace(found, methods=methods)


def advice(wishes: Wishes | None = None, **runs: tuple[Outcome, ...]) -> Advice:
    found = planted({name.replace("_", ":"): outcomes for name, outcomes in runs.items()})
    return advise(found.methods, found.bound, wishes)


def text(found: Advice) -> str:
    return "\n".join(found.sentences)


class TestTime:
    def test_the_fastest_identical_method(self) -> None:
        found = advice(serial=rounds(SLOW), fused=rounds(FAST), static_4=rounds([2.0, 2.1, 2.0]))
        assert found.method == "fused" and "times as fast" in found.headline
        assert "3.00 times as fast as serial (2.82–3.20 over 3 rounds)" in found.sentences[0]
        assert "bound" in found.sentences[0] and "1.75" in found.sentences[0]
        assert found.runner_up == "static:4"
        assert any(line.startswith("Second is static:4: fused is 2.00 times as fast") for line in found.sentences)
        assert found.command == "headrace serve MODEL --policy fused"

    def test_what_no_server_does_can_be_second_and_is_named_where_it_is_better(self) -> None:
        found = advice(serial=rounds(SLOW), fused=rounds(FAST), dataloader=rounds([2.0, 2.1, 2.0]))
        assert (found.method, found.runner_up) == ("fused", "dataloader")
        assert "Second is dataloader: fused is 2.00 times as fast" in text(found)
        found = advice(serial=rounds(SLOW), fused=rounds([2.0, 2.1, 2.0]), dataloader=rounds(FAST))
        assert (found.method, found.runner_up) == ("fused", "serial")
        assert "dataloader was 2.00 times as fast as fused" in text(found) and "Second is" not in text(found)
        assert found.sentences[-1] == "Start it with: headrace serve MODEL --policy fused"
        found = advice(serial=rounds(SLOW), fused=rounds([2.0, 2.1, 2.0]), static_4=rounds(FAST))
        assert found.method == "static:4" and found.command == "headrace serve MODEL --policy static:4"

    def test_ties_go_to_fused_and_are_named(self) -> None:
        found = advice(serial=rounds(SLOW), static_4=rounds(FAST), fused=rounds([1.0, 1.1, 1.01]))
        assert found.method == "fused"
        assert any("No significant difference between fused and static:4" in line for line in found.sentences)
        assert "Second is" not in text(found)

    def test_a_faster_method_with_other_tokens_is_out(self) -> None:
        found = advice(serial=rounds(SLOW), fused=rounds([1.0, 1.0, 1.0], WRONG))
        assert found.method == "serial"
        assert any("fused is out" in line and "token 3 of question 2" in line for line in found.sentences)

    def test_no_difference_too_few_and_alone(self) -> None:
        same = advice(serial=rounds([1.0, 1.1, 1.2]), fused=rounds([1.1, 1.0, 1.15]))
        assert same.method == "serial" and "no significant difference" in same.sentences[0]
        assert same.command == "headrace serve MODEL --policy serial"
        few = advice(serial=rounds([3.0]), fused=rounds([1.0]))
        assert "1 round" in few.headline and "No advice" in few.sentences[0] and few.command is None
        assert advice(serial=rounds([3.0])).method == "serial"

    def test_where_requests_come_one_after_the_other_it_is_the_latency_that_counts(self) -> None:
        """Both runs last as long as the arrivals; fused answers in a tenth of the time."""

        def late(latency_s: float) -> tuple[Outcome, ...]:
            requests = [
                RequestRun(tokens, "length", at, (at + latency_s,) * len(tokens), at + latency_s)
                for tokens, at in zip(OUTPUTS, (0.0, 9.0), strict=True)
            ]
            return tuple(Outcome(tuple(requests), 9.0 + latency_s) for _ in range(8))

        found = advice(serial=late(0.5), fused=late(0.05))
        assert found.method == "fused" and "10.00 times as fast" in found.sentences[0]


class TestOtherObjectives:
    RUNS: ClassVar[Mapping[str, tuple[Outcome, ...]]] = {
        "serial": rounds([3.0] * 8, joules={"rapl": 30.0}, peak_rss_bytes=100),
        "fused": rounds([1.0] * 8, joules={"rapl": 20.0}, peak_rss_bytes=300),
        "static_2": rounds([2.0] * 8, joules={"rapl": 10.0}, peak_rss_bytes=200),
    }

    def advice(self, objective: str, prices: Prices | None = None, slo: Slo | None = None) -> Advice:
        return advice(Wishes(objective, slo, prices or Prices()), **self.RUNS)

    def test_each_has_its_own_best(self) -> None:
        assert self.advice("time").method == "fused"
        assert self.advice("energy").method == "static:2"
        assert self.advice("memory").method == "serial"
        assert self.advice("cost", Prices(per_hour=1.0)).method == "fused"
        assert self.advice("cost", Prices(per_kwh=1.0)).method == "static:2"
        assert "3.00 times as sparing of energy as serial" in self.advice("energy").headline
        assert "No method was more sparing of memory" in self.advice("memory").headline

    def test_what_would_change_the_choice_is_said(self) -> None:
        said = text(self.advice("time"))
        assert "By energy it would be static:2." in said and "By memory it would be serial." in said
        assert "By cost" not in said, "no price was given"
        assert "By time it would be fused." in text(self.advice("energy"))
        found = planted({name.replace("_", ":"): runs for name, runs in self.RUNS.items()})
        crossing = "fused is better from 1.2 requests/s on (90 % interval 1.1–1.4), serial below."
        assert crossing in advice_of(found, crossing=crossing).sentences

    def test_what_is_no_better_would_change_nothing(self) -> None:
        runs = {name: rounds([one.seconds for one in found], peak_rss_bytes=100) for name, found in self.RUNS.items()}
        assert "By memory" not in text(advice(**runs))

    def test_without_a_price_or_joules_the_advice_is_by_time(self) -> None:
        found = self.advice("cost")
        assert found.method == "fused" and "no price was given. The advice is by time." in text(found)
        silent = advice(Wishes("energy"), serial=rounds(SLOW), fused=rounds(FAST))
        assert silent.method == "fused" and "joules are not known" in text(silent)

    def test_a_method_without_the_figure_is_left_out(self) -> None:
        runs = dict(self.RUNS) | {"static_2": rounds([2.0] * 8)}
        found = advice(Wishes("energy"), **runs)
        assert found.method == "fused" and "static:2 is left out: its energy was not measured." in text(found)

    def test_an_unknown_objective_is_refused(self) -> None:
        with pytest.raises(InvalidParameter, match=r"^objective: got 'speed', allowed: time, cost, energy, memory"):
            self.advice("speed")

    def test_what_misses_the_slo_is_out(self) -> None:
        # First tokens of `outcome` come after a quarter of the run.
        found = self.advice("energy", slo=Slo(ttft_s=0.3))
        assert found.method == "fused"
        assert "static:2 is out: it does not meet the SLO (p95 TTFT 0.5 s, wanted 0.3 s)." in text(found)
        assert "serial does not meet the SLO (p95 TTFT 0.75 s" in found.sentences[0]
        assert "Without the SLO it would be static:2." in found.sentences

    def test_an_slo_that_nobody_meets_is_said(self) -> None:
        found = self.advice("time", slo=Slo(ttft_s=0.01))
        assert found.method == "fused" and " is out" not in text(found)
        assert found.sentences[0] == "No method with identical tokens meets the SLO; without it:"
        assert found.sentences[1].startswith("Use fused")


class TestLossyAndForeign:
    GOOD = SameModel(5000, 0.01, 0.5, 0.985, None)

    def advice(
        self, name: str, seconds: float, quality: SameModel, outputs: Sequence[tuple[int, ...]] = WRONG
    ) -> Advice:
        runs = {"serial": rounds([3.0] * 8), "fused": rounds([1.0] * 8), name: rounds([seconds] * 8, outputs)}
        found = planted(runs, [name], quality)
        return advise(found.methods, found.bound)

    def test_a_lossy_method_is_named_with_its_loss_and_not_chosen(self) -> None:
        found = self.advice("fused-int8", 0.5, self.GOOD)
        assert found.method == "fused" and "fused-int8" not in found.headline
        said = next(line for line in found.sentences if line.startswith("fused-int8 is lossy"))
        assert (
            "2.00 times as fast as fused" in said and "top-1 98.5 %, mean KL 1.0e-02 nats" in said and ": ok." in said
        )
        assert said.endswith("If that loss is acceptable: headrace serve MODEL --policy fused --quant int8")
        assert "fused-int8 is out" not in text(found), "it never promised these tokens"

    def test_even_where_its_tokens_are_the_same(self) -> None:
        found = self.advice("fused-int4", 0.5, self.GOOD, OUTPUTS)
        assert found.method == "fused" and found.runner_up == "serial"

    def test_a_loss_beyond_the_limits_gets_no_command(self) -> None:
        found = self.advice("fused-int4", 0.5, SameModel(300, 0.5, 2.0, 0.8, None))
        said = next(line for line in found.sentences if line.startswith("fused-int4 is lossy"))
        assert ": refuse." in said and "fewer than the 4096" in said and "--quant" not in said

    def test_a_slower_one_says_so(self) -> None:
        assert "not faster than fused" in text(self.advice("fused-int8", 2.0, self.GOOD))

    @pytest.mark.parametrize(
        ("top1", "kl", "gate"),
        [
            (0.98, 0.02, "ok"),
            (0.979, 0.001, "warn"),
            (1.0, 0.021, "warn"),
            (0.95, 0.1, "warn"),
            (0.949, 0.0, "refuse"),
            (1.0, 0.11, "refuse"),
            (1.0, None, "refuse"),
        ],
    )
    def test_gate(self, top1: float, kl: float | None, gate: str) -> None:
        assert quality_gate(SameModel(5000, kl, kl, top1, None)) == gate

    @pytest.mark.parametrize("name", ["llama.cpp", "url:http://127.0.0.1:8000"])
    def test_a_faster_engine_from_outside_is_named(self, name: str) -> None:
        found = self.advice(name, 0.8, SameModel(7, None, None, 1.0, None))
        assert found.method == "fused"
        assert any(
            line.startswith(f"{name}, an engine from outside, was 1.25 times as fast as fused")
            and "other tokens" in line
            for line in found.sentences
        )
        assert name not in text(self.advice(name, 1.5, self.GOOD)), "a slower one is no news"

    def test_what_serve_does_not_do_is_named_and_not_chosen(self) -> None:
        found = planted({"serial": rounds([3.0] * 8), "fused": rounds([1.0] * 8), "instances": rounds([0.5] * 8)})
        said = advise(found.methods, found.bound)
        assert said.method == "fused"
        assert "headrace serve does not do that" in text(said) and "instances was 2.00 times as fast" in text(said)


class TestCommand:
    def test_every_flag_exists_and_says_what_was_measured(self) -> None:
        config = replace(
            comparison({"serial": rounds(SLOW)}).config,
            backend="native",
            dtype="float32",
            quant="stored",
            threads=3,
            instruction_set="avx2",
            block_size=32,
            reasons={
                "backend": "as set",
                "threads": "as set",
                "quant": "stored: as the checkpoint has them",
                "max_num_seqs": "32: the default",
            },
        )
        command = serve_command("/models/my model.gguf", "fused-int4", config)
        assert command == (
            "headrace serve '/models/my model.gguf' --policy fused --backend native --threads 3 "
            "--instruction-set avx2 --block-size 32 --quant int4"
        )
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        given = parser.parse_args(["x", *command.partition("gguf' ")[2].split()])
        assert (given.policy, given.backend, given.threads, given.quant) == ("fused", "native", 3, "int4")
        assert (given.instruction_set, given.block_size) == ("avx2", 32)

    @pytest.mark.parametrize("name", ["fused", "serial", "static:8", "window:50"])
    def test_policies(self, name: str) -> None:
        assert serve_command("demo", name, None) == f"headrace serve demo --policy {name}"

    @pytest.mark.parametrize(
        "name", ["threads", "instances:4", "dataloader:8", "llama.cpp", "url:http://x", "no-kv-cache"]
    )
    def test_what_has_none(self, name: str) -> None:
        assert serve_command("demo", name, None) is None


class TestTexts:
    def test_claims_say_their_numbers(self) -> None:
        base = rounds([3.0] * 8)
        timing = time_method(rounds([1.5] * 8), base)
        assert claim_text(timing) == "faster, ratio 2.00 (2.00–2.00), p = 0.0078"
        assert claim_text(time_method(rounds(FAST), rounds(SLOW))) == "faster, ratio 3.00 (2.82–3.20)"
        assert claim_text(time_method(base, base)) == str(Claim.BASE)

    def test_rules_say_their_level(self) -> None:
        assert "p ≤ 0.01" in rule_text(10) and "10,000 resamples" in rule_text(8)
        assert "5%" in rule_text(5) and "8 rounds or more are judged at 1%" in rule_text(3)
        assert "2 rounds cannot tell" in rule_text(2)

    def test_short_runs_and_arrivals_are_told(self) -> None:
        found = comparison({"serial": rounds(SLOW), "fused": rounds(FAST)})
        assert "that arrive together" in measured_text(found) and "of median length" not in measured_text(found)
        requests = (found.workload.requests[0], replace(found.workload.requests[1], arrival_s=2.5))
        arriving = replace(found, workload=replace(found.workload, requests=requests))
        assert "that arrive within 2.5 s" in measured_text(arriving)
        short = comparison({"serial": rounds(SLOW), "fused": rounds([0.1, 0.1, 0.1])})
        assert "the one of median length counts" in measured_text(short)


def test_figures_do_not_depend_on_the_advice() -> None:
    """The SLO is judged by the same percentiles that the report shows."""
    method: MethodResult = comparison({"serial": rounds(SLOW)}).methods[0]
    assert method.figures.ttft == figures_of(method.rounds, Slo(1.0), Prices()).ttft
