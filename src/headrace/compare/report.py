"""The comparison as one HTML page in itself: no script, nothing fetched. Every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from headrace.compare import cells, study
from headrace.compare.advice import Advice, claim_text, measured_text, model_text, rule_text
from headrace.compare.answers import shown_answers
from headrace.compare.arithmetic import order_text, warms_up_whole
from headrace.compare.flover.render import headline, section
from headrace.compare.flover.results import Result
from headrace.compare.machine import probe_machine
from headrace.compare.measure import WARM_UP_REQUESTS, WARM_UP_TOKENS, Claim, energy_difference
from headrace.compare.report_figures import figures
from headrace.compare.report_tables import details, divergences, summary
from headrace.compare.runner import Comparison, Wishes
from headrace.compare.traffic import printable
from headrace.core.resolve import precision_text
from headrace.engine.model import OpenModel
from headrace.pages.markup import cell, grid, listed, name_cell, safe, whole_page
from headrace.pages.plain import shortened

MOST_QUESTIONS = 8
"""Whose answers are on the page; those that differ come first."""
MOST_LETTERS = 4000
"""Of a prompt or an answer."""


def page(comparison: Comparison, advice: Advice) -> str:
    """The whole document. `advice`: what `advise` said of this comparison."""
    sections = (
        *_advice(advice),
        *summary(comparison),
        *_failures(comparison),
        *figures(comparison),
        *details(comparison),
        *divergences(comparison),
        *_study(comparison),
        *_questions(comparison),
        *_method(comparison),
        *_settings(comparison),
    )
    when = comparison.measured_at[:16].replace("T", " ") + " UTC"
    title = f"{advice.headline} · {comparison.model_name}"
    asked = f"{comparison.workload.name}: {cells.describe_workload(comparison)}"
    precision = f"{comparison.config.backend}, {precision_text(comparison.config)}"
    kicker = (comparison.model_name, precision, asked, comparison.machine.device(comparison.config), when)
    return whole_page("headrace compare", title, kicker, advice.headline, sections)


def flover_page(result: Result, opened: OpenModel) -> str:
    """The whole document of an experiment of the Flover study."""
    config, name = opened.config, printable(Path(opened.checkpoint.path.resolve().name))
    kicker = (name, f"{config.backend}, {precision_text(config)}", probe_machine().device(config))
    return whole_page("headrace compare", f"{headline(result)} · {name}", kicker, headline(result), [section(result)])


def _advice(advice: Advice) -> Iterator[str]:
    for sentence in advice.sentences:
        if advice.command is not None and sentence.endswith(advice.command):
            yield f"<p>{safe(sentence.removesuffix(advice.command))}</p>\n<pre>{safe(advice.command)}</pre>"
        else:
            yield f"<p>{safe(sentence)}</p>"


def _failures(comparison: Comparison) -> Iterator[str]:
    if not comparison.failures:
        return
    yield "<h2>Methods that did not run</h2>"
    rows = [
        f"{name_cell(one.name)}{cell(cells.reason_text(one), 'text', one.description)}" for one in comparison.failures
    ]
    yield grid((("method", ""), ("why", "")), rows)


def _study(comparison: Comparison) -> Iterator[str]:
    yield "<h2>Beside the study this generalises</h2>"
    yield f"<p>{safe(study.SOURCE)}.</p>"
    if not study.applies(comparison):
        yield "<p>The requests here are others than the study's: its ratios say what such methods did there.</p>"
    rows = []
    for published, ours in study.rows(comparison):
        here = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ours) or "–"
        rows.append(f"{cell(published.what)}{cell(study.ratio_text(published.ratio), 'number')}{cell(here, 'text')}")
    bound = "batching bound: Σ lengths / longest length of the answers"
    rows.append(f"{cell(bound)}{cell('≤ 4 (text), ≤ 6 (pictures)', 'number')}{cell(f'{comparison.bound:.2f}', 'text')}")
    yield grid((("ratio of times", ""), ("study", "number"), ("here", "")), rows)
    yield listed(study.CAVEATS)


def _questions(comparison: Comparison) -> Iterator[str]:
    yield "<h2>Requests and answers</h2>"
    shown = _shown_questions(comparison)
    results = {result.name: result for result in comparison.methods}
    for index in shown:
        asked = comparison.workload.requests[index]
        title = f". {asked.title}" if asked.title else ""
        prompt = asked.text or f"a prompt of {len(asked.token_ids)} tokens"
        yield f"<h3>{index + 1}{safe(title)}</h3>\n<blockquote>{safe(shortened(prompt, MOST_LETTERS))}</blockquote>"
        for name, text in shown_answers(comparison, index):
            answer = results[name].rounds[0].requests[index]
            same = [one.name for one in comparison.methods if one.rounds[0].outputs[index] == answer.token_ids]
            caption = f"{', '.join(same)} · {_tokens(len(answer.token_ids))}, {cells.ending_text(answer.finish_reason)}"
            yield f'<p class="note">{safe(caption)}</p>\n<pre>{safe(shortened(text, MOST_LETTERS))}</pre>'
    if left := len(comparison.workload.requests) - len(shown):
        noun = "request" if left == 1 else "requests"
        yield f'<p class="note">{left} more {noun}, and every token id, are in the JSON report (--json).</p>'


def _shown_questions(comparison: Comparison) -> list[int]:
    count = len(comparison.workload.requests)
    differ = {found.question for result in comparison.methods for found in cells.differing(result)}
    return sorted(sorted(range(count), key=lambda index: (index not in differ, index))[:MOST_QUESTIONS])


def _tokens(count: int) -> str:
    return f"{count} {'token' if count == 1 else 'tokens'}"


def _settings(comparison: Comparison) -> Iterator[str]:
    config = comparison.config
    names = [name for name in config.__dataclass_fields__ if name not in ("reasons", "policy")]
    reasons: Mapping[str, str] = {"prefix_cache": "off, so that every round computes everything", **config.reasons}
    rows = []
    for name in names:
        value = getattr(config, name)
        reason = reasons.get(name, "as set, or the default").removeprefix(f"{value}: ")
        rows.append(f"<td><code>{name}</code></td>{cell(value)}{cell(reason, 'text')}")
    machine = comparison.machine
    libraries = ", ".join(f"{name} {found}" for name, found in machine.libraries.items())
    facts = (
        ("model", comparison.model),
        ("fingerprint", comparison.fingerprint),
        (
            "machine",
            f"{machine.cpu}; {machine.cores} CPUs usable; {machine.memory_bytes / 2**30:.1f} GiB; {machine.system}"
            + ("" if machine.gpu is None else f"; {machine.gpu}"),
        ),
        ("software", f"Python {machine.python}, {libraries}"),
    )
    yield "<h2>Settings</h2>"
    yield "<ul>\n" + "".join(f"<li>{name}: <code>{safe(value)}</code></li>\n" for name, value in facts) + "</ul>"
    yield grid((("setting", ""), ("value", ""), ("why", "")), rows)


def _warm_up(comparison: Comparison) -> str:
    short = f"of up to {WARM_UP_REQUESTS} requests with up to {WARM_UP_TOKENS} tokens each"
    if not warms_up_whole(comparison.config):
        return short
    return f"of the whole workload (kernels are compiled when a shape first comes up; engines from outside: {short})"


def _method(comparison: Comparison) -> Iterator[str]:
    workload = comparison.workload
    asked = "through the model's chat template" if workload.templated else "as plain text (no chat template)"
    stop = "to exactly their limit" if workload.ignore_eos else "up to their natural end or the limit"
    others = [one for one in comparison.methods if one.timing.claim is not Claim.BASE]
    claims = "; ".join(f"{one.name}: {claim_text(one.timing)}" for one in others)
    points = (
        measured_text(comparison),
        f"Requests were asked {asked}, decoded greedily {stop}, with the same token ids for every method (workload "
        f"{workload.name}, SHA-256 {workload.sha256}).",
        *workload.notes,
        *(f"{result.name}: {result.description}." for result in comparison.methods),
        f"A warm-up run of each method, {_warm_up(comparison)}, is not counted. Each round runs every method once, "
        "beginning with another one each time.",
        "× serial is paired: serial's seconds over the method's in the same round. Its interval is a bootstrap "
        f"over the rounds. {rule_text(comparison.repeats)}",
        f"What the pairs say: {claims}." if claims else "Only one method was run.",
        "Time to first token counts from a request's arrival. Percentiles are of all requests of a round; what is "
        "shown is the median over the rounds.",
        *_energy(comparison),
        *_wishes(comparison.wishes),
        "Same arithmetic: token ids of every round against serial's first round, on the same weights, backend, "
        f"precision and KV cache.{order_text(comparison.config)}",
        model_text(comparison),
        *(f"{result.name} under the fp32 model: {cells.quality_text(result)}." for result in comparison.methods),
        f"Batching bound: Σ lengths / longest length of serial's answers is {comparison.bound:.2f}. So much faster "
        "than one by one can a batch of all of them be, where a step takes as long for many rows as for one (a decode "
        "bound by memory traffic) and prompts cost nothing.",
    )
    yield "<h2>How it was measured</h2>"
    yield listed(points)


def _energy(comparison: Comparison) -> Iterator[str]:
    """Where the joules are from, and whether they differ."""
    sources: dict[str, list[str]] = {}
    for result in comparison.methods:
        sources.setdefault(result.figures.energy_source, []).append(result.name)
    if list(sources) == [""]:
        yield "Energy was not measured: no meter could be read here."
        return
    told = "; ".join(f"{', '.join(names)}: {source or 'not measured'}" for source, names in sources.items())
    yield f"Energy is that of the whole machine in a run, idle power included. Its source: {told}."
    if any(cells.is_estimated(result) for result in comparison.methods):
        yield "Estimated means power at full load times load: a model, not a reading."
    for result in comparison.methods[1:]:
        if found := energy_difference(comparison.base.rounds, result.rounds):
            yield f"Energy of {result.name} against {comparison.base.name}: {found}."


def _wishes(wishes: Wishes) -> Iterator[str]:
    """What the user asked for, where it is more than the time."""
    if wishes.objective != "time":
        yield f"The best method was to have least {wishes.objective}."
    slo, prices = wishes.slo, wishes.prices
    if slo is not None and slo.asked:
        limits = (("time to first token", slo.ttft_s), ("mean time between tokens", slo.itl_s))
        told = " and ".join(f"{name} ≤ {limit:g} s" for name, limit in limits if limit is not None)
        yield f"Goodput counts the requests with {told}."
    given = (
        ("an hour of the machine", prices.per_hour),
        ("a kilowatt-hour", prices.per_kwh),
        ("grams of CO₂ a kilowatt-hour", prices.gco2_per_kwh),
    )
    if told := ", ".join(f"{name} {value:g}" for name, value in given if value is not None):
        yield f"Costs are of the prices that were given, in their currency: {told}."
