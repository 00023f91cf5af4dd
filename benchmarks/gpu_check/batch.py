"""Stage batch: Llama-2-7B's shape, bf16, 64 requests of 512 + 512 tokens: headrace beside transformers' continuous
batching (`generate_batch`) and its static batch (`generate`), on one card, with the same weights and prompts, in turn.

What transformers needs to get ready (its cache, its CUDA graphs) is not counted: of `generate_batch` the time runs from
its first request's start to its last one's end, by its own stamps. No answer ends early, for no id ends one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.engine import LLAMA2_7B, TINY_LLAMA, Answers, Engine, Model, llama, prompts
from benchmarks.gpu_check.rows import Case, Figure, Target

from headrace.weights.qtensor import QTensor

REQUESTS, PROMPT, ANSWER = 64, 512, 512
ROUNDS = 3
OURS, CONTINUOUS, STATIC = "headrace", "transformers continuous batching", "transformers generate, static"
TARGETS = {CONTINUOUS: 1.3, STATIC: 3.0}
CACHE_SHARE = 0.6
"""Of the memory that is free, for the cache of `generate_batch`: the rest is for activations."""
FIRST_S = {OURS: 60.0, CONTINUOUS: 60.0, STATIC: 45.0}
"""What the first round may need."""


class Contest:
    """The three, with the same weights. Each is made when it first runs."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.requests, self.prompt, self.answer = (4, 12, 6) if bench.dry else (REQUESTS, PROMPT, ANSWER)
        self.first_tokens: dict[str, list[int]] = {}

    @cached_property
    def prompts(self) -> list[list[int]]:
        return prompts(self.requests, self.prompt, llama(self.bench.dry).spec.vocab_size, self.bench.seed)

    @cached_property
    def theirs(self) -> Any:
        """transformers' model, its random weights made on the device."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        config: dict[str, Any] = dict(TINY_LLAMA if self.bench.dry else LLAMA2_7B)
        for key in ("architectures", "model_type", "torch_dtype"):
            del config[key]
        config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        dtype = torch.float32 if self.bench.dry else torch.bfloat16
        with torch.device(self.bench.clock.device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype, attn_implementation="sdpa")
        return model.eval()

    def ours(self, batch_invariant: bool = False) -> Engine:
        model = llama(self.bench.dry)

        def make() -> Engine:
            return Engine(
                model,
                self.bench.dry,
                rows=self.requests,
                tokens=128 if self.bench.dry else 8192,
                longest=self.prompt + self.answer + 1,
                tensors=shared_tensors(model, self.theirs),
                batch_invariant=batch_invariant,
            )

        return self.bench.engine(f"batch, invariant {batch_invariant}", make)

    # ------------------------------------------------------------ a run of each

    def run_ours(self) -> float:
        running = self.ours()
        self._warm(running)
        answers = self._timed(running)
        self._check(OURS, [answers.tokens[str(i)] for i in range(self.requests)])
        return answers.seconds

    def run_invariant(self) -> float:
        running = self.ours(batch_invariant=True)
        self._warm(running)
        return self._timed(running).seconds

    def _timed(self, running: Engine) -> Answers:
        return running.run(self.prompts, [self.answer] * self.requests)

    def _warm(self, running: Engine) -> None:
        """Prompts and a few tokens: whatever is compiled or captured on first use is there then."""
        running.run(self.prompts, [4] * self.requests)

    def run_continuous(self) -> float:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        self.bench.clock.free()
        tiny = {"num_blocks": 8, "max_batch_tokens": 64}
        settings = ContinuousBatchingConfig(**(tiny if self.bench.dry else {"max_memory_percent": CACHE_SHARE}))
        found = self.theirs.generate_batch(
            inputs=self.prompts,
            generation_config=self._generation(),
            continuous_batching_config=settings,
            max_new_tokens=self.answer,
        )
        if len(found) != self.requests:
            raise RuntimeError(f"generate_batch answered {len(found)} of {self.requests} requests")
        faults = [one.error for one in found.values() if one.error is not None]
        if faults:
            raise RuntimeError(f"generate_batch failed {len(faults)} requests: {faults[0]}")
        self._check(CONTINUOUS, [list(one.generated_tokens) for one in found.values()])
        stamps = [one.lifespan for one in found.values()]
        return float(max(end for _, end in stamps) - min(begin for begin, _ in stamps))

    def run_static(self) -> float:
        self.bench.clock.free()
        device = self.bench.clock.device
        ids = torch.tensor(self.prompts, device=device)
        given = {"attention_mask": torch.ones_like(ids), "generation_config": self._generation()}
        with torch.inference_mode():
            self.theirs.generate(ids, **(given | {"generation_config": self._generation(4)}))  # warms up
            self.bench.clock.wait()
            began = time.perf_counter()
            found = self.theirs.generate(ids, **given)
            self.bench.clock.wait()
            seconds = time.perf_counter() - began
        self._check(STATIC, [[int(one) for one in row] for row in found[:, self.prompt :]])
        return seconds

    def _generation(self, tokens: int | None = None) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=tokens or self.answer, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
        )

    def _check(self, name: str, answers: Sequence[Sequence[int]]) -> None:
        """All tokens that were asked for came. Keeps the first of each answer."""
        short = [len(one) for one in answers if len(one) != self.answer]
        if short or len(answers) != self.requests:
            raise RuntimeError(f"{name}: {len(answers)} answers, {len(short)} of them not of {self.answer} tokens")
        self.first_tokens[name] = [one[0] for one in answers]

    def agreement(self, name: str) -> str:
        """How many first tokens are the same as ours. Random weights have near ties, so not all need be."""
        mine, other = self.first_tokens.get(OURS), self.first_tokens.get(name)
        if mine is None or other is None:
            return ""
        return f"{sum(a == b for a, b in zip(mine, other, strict=True))} of {len(mine)} first tokens the same as ours"


def shared_tensors(model: Model, theirs: Any) -> Iterator[tuple[str, QTensor]]:
    """transformers' weights by our names."""
    named = dict(theirs.named_parameters())
    for rule in model.weight_map.rules:
        if rule.op != "same":
            raise RuntimeError(f"{rule.target}: operation {rule.op} is not looked after here")
        tensor = named[rule.sources[0]].detach()
        if tensor.dtype == torch.bfloat16:
            yield rule.target, QTensor.from_array(tensor.view(torch.int16).cpu().numpy().view(np.uint16))
        else:
            yield rule.target, QTensor.from_array(tensor.cpu().numpy())


# ---------------------------------------------------------------- rows


def cases(bench: Bench) -> list[Case]:
    contest = Contest(bench)
    runs = {OURS: contest.run_ours, CONTINUOUS: contest.run_continuous, STATIC: contest.run_static}
    found = []
    for number in range(1, 2 if bench.dry else ROUNDS + 1):
        order = list(runs) if number % 2 else list(reversed(runs))
        found += [_round(contest, number, name, runs[name]) for name in order]
        if number == 1:
            found += [_verdict(contest, name) for name in TARGETS]
    again = [] if bench.dry else [_verdict(contest, name, "all rounds") for name in TARGETS]
    what = "the same with every answer's bits independent of the batch; ratio: its time ÷ the ordinary one's"
    invariant = Case(f"{OURS}, batch-invariant", what, lambda: _invariant(contest), None, 45)
    return [*found, *again, invariant]


def _round(contest: Contest, number: int, name: str, run: Callable[[], float]) -> Case:
    return Case(
        f"round {number}: {name}",
        f"{contest.requests} requests of {contest.prompt} + {contest.answer} tokens, all at once",
        lambda: _measured(contest, name, run),
        None,
        FIRST_S[name] if number == 1 else 35.0,
    )


def _measured(contest: Contest, name: str, run: Callable[[], float]) -> Figure:
    seconds = run()
    tokens = contest.requests * contest.answer / seconds
    notes = [f"{tokens:.0f} tokens/s", contest.agreement(name) if name != OURS else ""]
    return Figure([seconds], "s", note="; ".join(filter(None, notes)), more={"tokens_per_s": tokens})


def _verdict(contest: Contest, name: str, when: str = "first round") -> Case:
    return Case(
        f"{OURS} over {name}, {when}",
        "median time of theirs ÷ median time of ours",
        lambda: _ratio(contest, name),
        Target(TARGETS[name]),
        0,
    )


def _ratio(contest: Contest, name: str) -> Figure:
    ours, theirs = (contest.bench.report.samples(one) for one in (OURS, name))
    if not ours or not theirs:
        raise RuntimeError(f"no time of {name if ours else OURS}")
    ratio = median(theirs) / median(ours)
    note = f"{median(theirs):.2f} s (n {len(theirs)}) ÷ {median(ours):.2f} s (n {len(ours)})"
    pairs = [one / other for one, other in zip(theirs, ours, strict=False)]
    return Figure(pairs, "×", None, ratio, note)


def _invariant(contest: Contest) -> Figure:
    plain = contest.bench.report.samples(OURS)
    seconds = contest.run_invariant()
    if not plain:
        return Figure([seconds], "s", note="no time of the ordinary run to compare with")
    return Figure([seconds], "s", ratio=seconds / median(plain), note=f"against {median(plain):.2f} s")
