"""The comparison as one HTML page in itself: no script, nothing fetched. Every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from headrace.compare.advice import advise, claim_text, measured_text, model_text
from headrace.compare.answers import clean, shown_answers
from headrace.compare.charts import seconds_chart, timeline_chart
from headrace.compare.measure import WARM_UP_TOKENS, Claim, Spread, figure, ratio_figure
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import SameModel, kl_figure, percent
from headrace.core.resolve import precision_text

STUDY: Sequence[tuple[str, str, str]] = (
    ("static batch against one by one", "3.307", "batch"),
    ("static batch against one by one, both with flash attention", "3.309", "batch"),
    ("thread pool against one by one", "1.065", ""),
    ("thread pool against one by one, both with flash attention", "1.059", ""),
    ("flash attention on against off: one by one / batch / threads", "1.111 / 1.111 / 1.105", ""),
    ("image + text: static batch against one by one", "1.515", ""),
    ("image + text: thread pool against one by one", "0.762", ""),
    ("vLLM against one by one with flash attention", "37.2", "fused"),
)
"""(what, published ratio, which of our methods is the nearest) of the NVLM acceleration study: NVLM-D-72B on six A100,
the same four questions unless another set is named (slides of NYCU-HPC-Team2, Open Hackathon, December 2024)."""


def page(comparison: Comparison) -> str:
    """The whole document."""
    advice = advise(comparison.methods, comparison.bound)
    style = files("headrace.compare").joinpath("report.css").read_text(encoding="utf-8")
    sections = (
        _summary(comparison, advice.sentences),
        _figures(comparison),
        *_questions(comparison),
        _settings(comparison),
        _method(comparison),
        _study(comparison),
    )
    when = comparison.measured_at[:16].replace("T", " ") + " UTC"
    title = f"{advice.headline} · {comparison.model_name}"
    kicker = (comparison.model_name, f"{comparison.config.backend}, {precision_text(comparison.config)}", when)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<p class="kicker">headrace compare · {" · ".join(map(_safe, kicker))}</p>\n'
        f"<h1>{_safe(advice.headline)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _safe(text: object) -> str:
    return escape(clean(str(text)))


def _cell(text: object, kind: str = "") -> str:
    return f'<td class="{kind}">{_safe(text)}</td>'


def _grid(head: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    """A table; `head`: (heading, class)."""
    cells = "".join(f'<th class="{kind}">{_safe(text)}</th>' for text, kind in head)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def _summary(comparison: Comparison, sentences: Sequence[str]) -> str:
    head = (
        ("method", ""),
        ("seconds", "number"),
        ("output tokens/s", "number"),
        ("× serial", "number"),
        ("iterations", "number"),
        ("same arithmetic", ""),
        ("same model", ""),
    )
    rows = [_row(result) for result in comparison.methods]
    said = "".join(f"<p>{_safe(sentence)}</p>\n" for sentence in sentences)
    note = "Median over the rounds, and below it the range. Same model: against the checkpoint's weights in fp32."
    return f'{said}{_grid(head, rows)}\n<p class="note">{_safe(note)}</p>'


def _row(result: MethodResult) -> str:
    timing = result.timing
    quality = result.same_model
    ratio = '<td class="number">1</td>'
    if timing.claim is not Claim.BASE:
        told = (
            "" if timing.claim in (Claim.FASTER, Claim.SLOWER) else f'<small class="said">{_safe(timing.claim)}</small>'
        )
        ratio = _spread(timing.ratio, ratio_figure, told)
    model = '<td class="good">lossless</td>'
    if not quality.lossless:
        top1 = percent(quality.top1_agreement)
        model = f'<td class="mild">KL\N{NO-BREAK SPACE}{kl_figure(quality.mean_kl)}<small>top-1 {top1}</small></td>'
    arithmetic = '<td class="good">identical</td>'
    if result.divergence is not None:
        arithmetic = f'<td class="bad">different<small>{_safe(result.divergence)}</small></td>'
    return (
        f'<td class="name">{_safe(result.name)}</td>{_spread(timing.spread, figure)}'
        f"{_cell(f'{timing.output_tokens_per_s:.1f}', 'number')}{ratio}"
        f"{_cell(len(result.rounds[0].iterations), 'number')}{arithmetic}"
        f"{model}"
    )


def _spread(spread: Spread, form: Callable[[float], str], more: str = "") -> str:
    spans = f"<small>{form(spread.low)}–{form(spread.high)}</small>" if spread.low < spread.high else ""
    return f'<td class="number">{form(spread.median)}{spans}{more}</td>'


def quality_text(quality: SameModel) -> str:
    """The figures of the same-model verdict."""
    divergence = "" if quality.divergence is None else f"; {quality.divergence}"
    return (
        f"mean KL {kl_figure(quality.mean_kl)}, max {kl_figure(quality.max_kl)} nats, "
        f"top-1 {percent(quality.top1_agreement)} of {quality.positions} tokens{divergence}"
    )


def _figures(comparison: Comparison) -> str:
    return (
        f"<h2>Seconds per round</h2>\n<figure>{seconds_chart(comparison)}\n"
        "<figcaption>All questions arrive at once; a round ends with the last answer. Bar: median. Whisker: fastest "
        "to slowest round.</figcaption></figure>\n"
        f"<h2>One round, answer by answer</h2>\n<figure>{timeline_chart(comparison)}\n"
        "<figcaption>Of each method the round nearest to its median. Pale: waiting and reading the prompt. Mark: first "
        "token. Strong: answering.</figcaption></figure>"
    )


def _questions(comparison: Comparison) -> Iterator[str]:
    yield "<h2>Questions and answers</h2>"
    for index, question in enumerate(comparison.workload.requests):
        yield f"<h3>{index + 1}. {_safe(question.title)}</h3>\n<blockquote>{_safe(question.text)}</blockquote>"
        answers = shown_answers(comparison, index)
        for name, text in answers:
            same = [
                result.name
                for result in comparison.methods
                if result.rounds[0].outputs[index] == _result(comparison, name).rounds[0].outputs[index]
            ]
            request = _result(comparison, name).rounds[0].requests[index]
            ending = "ended by itself" if request.finish_reason == "stop" else "cut at the length limit"
            caption = f"{', '.join(same)} · {len(request.token_ids)} tokens, {ending}"
            yield f'<p class="note">{_safe(caption)}</p>\n<pre>{_safe(text)}</pre>'


def _result(comparison: Comparison, name: str) -> MethodResult:
    return next(result for result in comparison.methods if result.name == name)


def _settings(comparison: Comparison) -> str:
    config = comparison.config
    names = [name for name in config.__dataclass_fields__ if name not in ("reasons", "policy")]
    reasons: Mapping[str, str] = {"prefix_cache": "off, so that every round computes everything", **config.reasons}
    rows = []
    for name in names:
        value = getattr(config, name)
        reason = reasons.get(name, "as set, or the default").removeprefix(f"{value}: ")
        rows.append(f"<td><code>{name}</code></td>{_cell(value)}{_cell(reason)}")
    machine = comparison.machine
    libraries = ", ".join(f"{name} {found}" for name, found in machine.libraries.items())
    facts = (
        ("model", comparison.model),
        ("fingerprint", comparison.fingerprint),
        (
            "machine",
            f"{machine.cpu}; {machine.cores} CPUs usable; {machine.memory_bytes / 2**30:.1f} GiB; {machine.system}",
        ),
        ("software", f"Python {machine.python}, {libraries}"),
    )
    told = "".join(f"<li>{name}: <code>{_safe(value)}</code></li>\n" for name, value in facts)
    grid = _grid((("setting", ""), ("value", ""), ("why", "")), rows)
    return f"<h2>Settings</h2>\n<ul>\n{told}</ul>\n{grid}"


def _method(comparison: Comparison) -> str:
    workload = comparison.workload
    asked = "through the model's chat template" if workload.templated else "as plain text (no chat template)"
    claims = "; ".join(
        f"{r.name}: {claim_text(r.timing)}" for r in comparison.methods if r.timing.claim is not Claim.BASE
    )
    points = (
        measured_text(comparison),
        f"Questions were asked {asked}, decoded greedily up to their natural end or the limit, with the same token ids "
        f"for every method (workload {workload.name}, SHA-256 {workload.sha256}).",
        *(f"{result.name}: {result.description}." for result in comparison.methods),
        f"A warm-up run of up to {min(WARM_UP_TOKENS, workload.max_tokens)} tokens an answer for each method is not "
        "counted. Each round runs every method once, beginning with another one each time.",
        "× serial is paired: serial's seconds divided by the method's in the same round. Faster or slower is said "
        "only if every round says so, and so clearly that two equal methods would look like it in at most 5 % of "
        "comparisons (five rounds by their pairs; three or four if the times do not overlap at all).",
        f"What the pairs say: {claims}." if claims else "Only one method was run.",
        "Same arithmetic: token ids of every round against serial's first round, on the same weights, backend, "
        "precision and KV cache.",
        model_text(comparison),
        *(f"{result.name} under the fp32 model: {quality_text(result.same_model)}." for result in comparison.methods),
        f"Batching bound: Σ lengths / max length of serial's answers is {comparison.bound:.2f}. So much faster than "
        "one by one can a batch of all of them be, where a step takes as long for many rows as for one (a decode bound "
        "by memory traffic) and prompts cost nothing.",
    )
    return "<h2>How it was measured</h2>\n<ul>\n" + "".join(f"<li>{_safe(point)}</li>\n" for point in points) + "</ul>"


def _nearest(comparison: Comparison, nearest: str) -> str:
    """Our methods that are most like one of the study's, with their ratios."""
    fused = [result for result in comparison.methods if result.name == "fused"]
    static = [result for result in comparison.methods if result.name.startswith("static:")]
    chosen = {"batch": static or fused, "fused": fused}.get(nearest, [])
    return ", ".join(f"{one.name} {one.timing.ratio.median:.2f}" for one in chosen) or "not measured here"


def _study(comparison: Comparison) -> str:
    rows = []
    for what, published, nearest in STUDY:
        ours = _nearest(comparison, nearest)
        rows.append(f"{_cell(what)}{_cell(published, 'number')}{_cell(ours, 'number')}")
    head = (("ratio of times", ""), ("study", "number"), ("here", "number"))
    return (
        "<h2>Beside the study this generalises</h2>\n"
        "<p>The NVLM acceleration study (Open Hackathon, December 2024) put these questions to NVLM-D-72B on six A100 "
        "GPUs. Ratios, never seconds: model, machine and answer lengths are others.</p>\n"
        f"{_grid(head, rows)}\n"
        "<p class='note'>The study does not state its answers' lengths. Its vLLM row does not state model, precision "
        "or number of GPUs either; batching four questions alone can give 4 at most.</p>"
    )
