"""`headrace compare --check FILE`: is what a certificate says true here? Every difference is named by its part."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from headrace.compare.advice import plural
from headrace.compare.certificate import (
    ARITHMETIC,
    CUDA_ARITHMETIC,
    Progress,
    Setting,
    config_of,
    hash_weights,
    instructions_of,
    prompts_sha256,
    seals,
    tokenizer_sha256,
    tokens_sha256,
)
from headrace.compare.certificate_reader import Certificate, Recorded, read_certificate
from headrace.compare.machine import probe_machine
from headrace.compare.methods import Method, Outcome
from headrace.compare.methods.bench import Bench, share_card
from headrace.compare.methods.registry import URL, make_method
from headrace.compare.pictures import with_pixels
from headrace.compare.score import Known, loader, score
from headrace.compare.verdict import RANKS, RequestVerdict, Verdict, first_difference
from headrace.compare.workloads import Workload, check_room
from headrace.core.config import ResolvedConfig
from headrace.core.errors import InvalidParameter, shorten
from headrace.core.types import ImageSpan
from headrace.engine.images import Encoded
from headrace.engine.model import OpenModel, create_backend
from headrace.pages.plain import clean

GUARDED = ("weights", "tokenizer_sha256", "workload", "prompts", "sampling", "reference", "method")
"""With one of these parts changed in the file, or other weights here, it would be another experiment: it is not run."""
CLASS = frozenset(
    {"machine.cpu", "machine.isa", "machine.system", "machine.gpu", "versions.headrace", "versions.numpy"}
)
"""What makes a class of machines; on the torch backend its version too, on a GPU all but the CPU."""
OF_CPU = frozenset({"machine.cpu", "machine.isa"})


class Kind(StrEnum):
    """What a difference says of the certificate."""

    FILE = "changed in the file"
    MODEL = "another model"
    CONFIG = "another arithmetic"
    ANSWER = "another answer"
    SETTING = "another setting"
    """Where it was run: no answer may depend on it, within the certificate's scope."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One part of a certificate that is not so here."""

    kind: Kind
    part: str
    """Path in the JSON: `machine.threads`, `results.3.sha256`, `weights.files.0`."""
    text: str
    """What is said and what was found."""
    verdict: RequestVerdict | None = None
    """Of another answer: where it leaves the certificate's; None also where that is not known."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of a check."""

    path: str
    certificate: Certificate
    differences: tuple[Difference, ...]
    ran: bool
    """Whether reference and method were run again."""
    same_class: bool
    """Whether this is the certificate's class of machine, versions included."""

    @property
    def broken(self) -> tuple[Difference, ...]:
        """All but settings, and near-ties where the order of summation follows the batch."""
        return tuple(one for one in self.differences if one.kind is not Kind.SETTING and one not in self.near_ties)

    @property
    def near_ties(self) -> tuple[Difference, ...]:
        """Other answers that the certificate's scope allows on any machine, its own too."""
        if not self.certificate.order_follows_batch:
            return ()
        return tuple(
            one for one in self.differences if one.verdict is not None and one.verdict.kind is Verdict.NEAR_TIE
        )

    @property
    def status(self) -> int:
        """Exit status of the command. 0: run again, nothing changed, every answer equal or one of `near_ties`; 1:
        anything else."""
        return 0 if self.ran and not self.broken else 1


def engine_settings(certificate: Certificate) -> dict[str, Any]:
    """Fields of `EngineConfig` in which the certificate was made; what the user sets goes above them. Threads and
    instruction set are left to this machine."""
    return {"device": "cpu", **(certificate.reference.config or {}), "prefix_cache": False}


def check(
    path: str,
    open_model: Callable[[Certificate], OpenModel],
    progress: Progress,
    make: Callable[[str, Bench], Method] = make_method,
) -> CheckResult:
    """Reads a certificate, compares what it says with what is here, and runs reference and method again.

    `open_model`: opens the model to check with, prefix cache off; it is closed here. `make`: a method by its name.
    Raises InputFileError for a file that is no certificate; ModelError, EngineError or RequestError where the model, a
    method of it or a prompt does not run here.
    """
    certificate = read_certificate(Path(path))
    found = changed_parts(certificate)
    with closing(open_model(certificate)) as opened:
        settings = list(compare_settings(certificate, opened))
        found += compare_model(certificate, opened, progress)
        blocked = any(one.kind is Kind.MODEL or _part_of(one, GUARDED) for one in found)
        decides = CLASS | ({"versions.torch"} if opened.config.backend == "torch" else frozenset())
        decides -= OF_CPU if opened.config.device == "cuda" else frozenset()
        same_class = not any(one.part in decides for one in settings)
        if not blocked:
            workload = _runnable(certificate, opened)
            share_card(opened, workload)
            outcomes = _run(certificate, workload, Bench(opened), found, progress, make)
            found += _answers(certificate, workload, opened, outcomes, progress)
    changed = {one.part for one in found if one.kind is Kind.FILE}
    found += settings
    kept = [one for one in found if one.kind is Kind.FILE or one.part not in changed]
    return CheckResult(path, certificate, tuple(kept), not blocked, same_class)


def changed_parts(certificate: Certificate) -> list[Difference]:
    """Parts that contradict others, and parts that are not as they were sealed."""
    found = [*_changed_prompts(certificate)]
    for index, one in enumerate(certificate.results):
        if (wrong := _contradiction(one, certificate.epsilon)) is not None:
            name, text = wrong
            found.append(Difference(Kind.FILE, f"results.{index}.{name}", f"prompt {index + 1}: {text}"))
    worst = max((one.verdict for one in certificate.results), key=RANKS.index)
    if certificate.verdict is not worst and not found:
        text = f"is {certificate.verdict}, but that of the worst answer is {worst}"
        found.append(Difference(Kind.FILE, "verdict", text))
    now = seals(certificate.raw)
    for part in sorted({*certificate.sealed, *now}, key=_natural):
        named = any(one.part == part or one.part.startswith(f"{part}.") for one in found)
        if certificate.sealed.get(part) != now.get(part) and not named:
            value = f"it is {shorten(certificate.value(part))} now" if part in now else "it is not there any more"
            found.append(Difference(Kind.FILE, part, f"was changed after it was sealed: {value}"))
    if certificate.workload_sha256 != certificate.workload.sha256 and not any(_part_of(one, GUARDED) for one in found):
        found.append(Difference(Kind.FILE, "workload.sha256", "is not the hash of the workload"))
    return found


def _part_of(one: Difference, parts: Sequence[str]) -> bool:
    return one.part.partition(".")[0] in parts


def _natural(part: str) -> list[tuple[int, str]]:
    """Sorts results.10 after results.9."""
    return [(int(name) if name.isdecimal() and len(name) < 10 else -1, name) for name in part.split(".")]


def _changed_prompts(certificate: Certificate) -> Iterator[Difference]:
    """The hash of all prompts tells whether a prompt's ids or its own hash were changed."""
    prompts = certificate.workload.prompts
    right = prompts_sha256(prompts) == certificate.prompts_sha256
    wrong = [
        index
        for index, (prompt, one) in enumerate(zip(prompts, certificate.results, strict=True))
        if tokens_sha256(prompt) != one.prompt_sha256
    ]
    for index in wrong:
        part = f"results.{index}.prompt_sha256" if right else f"workload.requests.{index}.token_ids"
        yield Difference(Kind.FILE, part, f"prompt {index + 1}: its token ids and its hash do not belong together")
    if not right and not wrong:
        yield Difference(Kind.FILE, "prompts.sha256", "is not the hash of the prompts, whose own hashes are right")


def _contradiction(one: Recorded, epsilon: float) -> tuple[str, str] | None:
    """(field, what is wrong with it) of an answer; None: it agrees with itself."""
    answer, expected = tokens_sha256(one.token_ids), tokens_sha256(one.expected)
    verdict = RequestVerdict(0, first_difference(one.expected, one.token_ids), one.margin, epsilon)
    if answer != one.sha256:
        if one.reference_ids is None and answer != one.reference_sha256:
            return "token_ids", "two hashes say that they were others"
        return "sha256", "is not the hash of the answer's token ids"
    if expected != one.reference_sha256:
        return "reference_sha256", "is not the hash of the reference's token ids"
    if one.tokens != len(one.token_ids):
        return "tokens", f"is {one.tokens}, but there are {len(one.token_ids)} token ids"
    if (one.at, one.verdict) != (verdict.token, verdict.kind):
        return "verdict", f"is {one.verdict}, but by the answer and its reference it is {verdict}"
    return None


def compare_model(certificate: Certificate, opened: OpenModel, progress: Progress) -> list[Difference]:
    """Weights and tokenizer, byte for byte. Raises CheckpointError."""
    here = {one.name: one for one in hash_weights(opened.checkpoint, progress).files}
    found = []
    for index, one in enumerate(certificate.weights):
        other = here.pop(one.name, None)
        if other is None:
            text = f"{shorten(one.name)} is not among the files of this model"
        elif other.nbytes != one.nbytes:
            text = f"{shorten(one.name)} has {other.nbytes} bytes here, {one.nbytes} in the certificate"
        elif other.sha256 != one.sha256:
            text = f"{shorten(one.name)} has other bytes: hash {other.sha256[:12]}… here, {one.sha256[:12]}… there"
        else:
            continue
        found.append(Difference(Kind.MODEL, f"weights.files.{index}", text))
    found += [
        Difference(Kind.MODEL, "weights.files", f"{shorten(name)} is a file of this model, but not in the certificate")
        for name in here
    ]
    if tokenizer_sha256(opened.checkpoint) != certificate.tokenizer_sha256:
        found.append(Difference(Kind.MODEL, "tokenizer_sha256", "the tokenizer here is another"))
    return found


def compare_settings(certificate: Certificate, opened: OpenModel) -> Iterator[Difference]:
    """Machine, threads and versions."""
    config = opened.config
    backend = create_backend(config.backend, config.instruction_set, config.device)
    setting = Setting(probe_machine(), instructions_of(backend), config.threads, config.device == "cuda")
    for name, said, here in (
        ("machine", certificate.machine, setting.machine_json()),
        ("versions", certificate.versions, setting.versions_json()),
    ):
        for field in dict.fromkeys((*said, *here)):
            if said.get(field) != here.get(field):
                yield Difference(Kind.SETTING, f"{name}.{field}", _there_and_here(said.get(field), here.get(field)))


def _there_and_here(said: object, here: object) -> str:
    return f"{_shown(said)} in the certificate, {_shown(here)} here"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _compare_config(side: str, said: Mapping[str, Any] | None, here: ResolvedConfig | None) -> Iterator[Difference]:
    known, found = said or {}, config_of(here) or {}
    for field in dict.fromkeys((*known, *found)):
        if known.get(field) != found.get(field):
            kind = Kind.CONFIG if field in (*ARITHMETIC, *CUDA_ARITHMETIC) else Kind.SETTING
            yield Difference(kind, f"{side}.config.{field}", _there_and_here(known.get(field), found.get(field)))


def _runnable(certificate: Certificate, opened: OpenModel) -> Workload:
    """The workload with its images' pixels. Raises RequestError for prompts that this model cannot be given, for an
    image that is another here, and for a method that a file may not choose."""
    for side in (certificate.reference, certificate.method):
        if side.name.startswith(URL):
            raise InvalidParameter("method", side.name, "what can be run on this machine: an address proves nothing")
    workload = with_pixels(certificate.workload, opened, "workload.requests.{}")
    for index, one in enumerate(workload.requests):
        where = f"workload.requests.{index}"
        room = opened.limits.max_model_len
        check_room(f"{where}.token_ids", len(one.token_ids), f"{where}.max_tokens", one.max_tokens, room)
        opened.request(where, Encoded(one.token_ids, one.images), workload.sampling(index))
    return workload


@dataclass(frozen=True, slots=True)
class _Rerun:
    name: str
    outcome: Outcome
    config: ResolvedConfig
    """What to compute margins in."""


def _run(
    certificate: Certificate,
    workload: Workload,
    bench: Bench,
    found: list[Difference],
    progress: Progress,
    make: Callable[[str, Bench], Method],
) -> Mapping[str, _Rerun]:
    """Side (reference, method) -> its run. What is other in their settings is added to `found`."""
    done: dict[str, _Rerun] = {}
    reruns: dict[str, _Rerun] = {}
    try:
        for side, said in (("reference", certificate.reference), ("method", certificate.method)):
            if said.name not in done:
                method = make(said.name, bench)
                progress(f"running again: {said.name}")
                try:
                    method.start(workload)
                    outcome = method.run(workload)
                finally:
                    method.close()
                found += _compare_config(side, said.config, method.config)
                done[said.name] = _Rerun(said.name, outcome, method.config or bench.opened.config)
            reruns[side] = done[said.name]
    finally:
        bench.close()
    return reruns


def _answers(
    certificate: Certificate, workload: Workload, opened: OpenModel, reruns: Mapping[str, _Rerun], progress: Progress
) -> Iterator[Difference]:
    """Answers that are not the certificate's, each with the place where it leaves that one and the margin there."""
    results = certificate.results
    sides = {
        "reference": ("reference_sha256", [one.expected for one in results], [one.reference_sha256 for one in results]),
        "method": ("sha256", [one.token_ids for one in results], [one.sha256 for one in results]),
    }
    for side, (field, recorded, digests) in sides.items():
        outputs = reruns[side].outcome.outputs
        # Of an answer whose ids or hash were changed in the file, one that agrees with either is enough.
        wrong = [
            index
            for index, (ids, digest, output) in enumerate(zip(recorded, digests, outputs, strict=True))
            if output != ids and (tokens_sha256(ids) == digest or tokens_sha256(output) != digest)
        ]
        if not wrong:
            continue
        progress(f"scoring {len(wrong)} answers that differ")
        # The engine's weights go before those of the scoring come.
        gc.collect()
        prompts = workload.prompts
        margins = _margins(
            [(prompts[index], recorded[index], outputs[index]) for index in wrong],
            [workload.requests[index].images for index in wrong],
            opened,
            reruns[side].config,
        )
        for index, margin in zip(wrong, margins, strict=True):
            token = first_difference(recorded[index], outputs[index])
            found = RequestVerdict(index, token, margin, certificate.epsilon)
            text = f"prompt {index + 1}: the answer of {reruns[side].name} is another here: {found}"
            yield Difference(Kind.ANSWER, f"results.{index}.{field}", text, found)


def _margins(
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    images: Sequence[tuple[ImageSpan, ...]],
    opened: OpenModel,
    config: ResolvedConfig,
) -> list[float | None]:
    """Of (prompt, certified answer, answer here) the margin where the two part, in the arithmetic `config`; None: the
    certified answer has ended there. `images`: of each prompt."""
    known: list[Known] = []
    seen: list[tuple[ImageSpan, ...]] = []
    places = [first_difference(certified, answer) for _, certified, answer in pairs]
    for (prompt, certified, answer), spans, token in zip(pairs, images, places, strict=True):
        assert token is not None
        if token < len(certified):
            seen.append(spans)
            # What the file says from there on may be no tokens of this model, and decides nothing.
            known.append((prompt, (*answer[:token], prompt[-1])))
    if not known:
        return [None] * len(pairs)
    longest = max(len(prompt) + len(output) for prompt, output in known)
    scores = iter(score(known, config.block_size, loader(opened, config, longest), None, seen))
    return [
        None if token == len(certified) else next(scores).margins[-1]
        for (_, certified, _), token in zip(pairs, places, strict=True)
    ]


def show(result: CheckResult, console: Console) -> None:
    """What was certified, every difference, and whether it holds here."""
    one = result.certificate
    prompts = len(one.results)
    console.print(
        _line(
            f"Certificate of {one.created}: {one.method.name} against {one.reference.name}, {prompts} "
            f"{plural(prompts, 'prompt')}, {one.model}: {one.verdict}."
        )
    )
    told = {
        "The file, the model or an answer is not what it was:": result.broken,
        "At a near-tie, as the certificate's scope allows on a GPU:": result.near_ties,
        "Run with other settings than then:": [one for one in result.differences if one.kind is Kind.SETTING],
    }
    for heading, differences in told.items():
        if differences:
            console.print(Text(heading, style="bold"))
        for difference in differences:
            console.print(_line(f"  {difference.part} ({difference.kind}): {difference.text}"), soft_wrap=True)
    for sentence in conclusion(result):
        console.print(Text(sentence))


def _line(text: str) -> Text:
    """What a file says must not look like lines of ours."""
    return Text(clean(text).replace("\n", " "))


def conclusion(result: CheckResult) -> tuple[str, ...]:
    """Whether the certificate holds here, in plain sentences."""
    prompts = len(result.certificate.results)
    counted = f"{prompts} {plural(prompts, 'prompt')}"
    if not result.ran:
        return ("Does not hold: what it is about was changed, or is another here, and so it was not run again.",)
    sentences = []
    wrong = {one.part.split(".")[1]: one for one in result.broken if one.kind is Kind.ANSWER}
    if not result.broken:
        tied = len({one.part.split(".")[1] for one in result.near_ties})
        but = f", but for near-ties in {tied} of them" if tied else ""
        sentences.append(
            f"Holds: run again, reference and method gave the same tokens as then for all of {counted}{but}."
        )
    elif not wrong:
        sentences.append(
            f"Does not hold as it is written; run again, the answers to all of {counted} are still those of then."
        )
    else:
        near = all(one.verdict is not None and one.verdict.kind is Verdict.NEAR_TIE for one in wrong.values())
        sentences.append(f"Does not hold here: other answers to {len(wrong)} of {counted}.")
        if near and not result.same_class:
            sentences.append(
                "All of them are near-ties on another class of machine, which the certificate's scope allows."
            )
    if not result.same_class:
        sentences.append("This is another class of machine, or has other versions, than the certificate's.")
    return tuple(sentences)
