"""A static batch, greedy: TorchBackend's plans against transformers' eager `generate`, demo model in float32.

    python benchmarks/torch_batch.py [--threads 2] [--rounds 4] [--requests 32] [--prompt 64] [--answer 32]

Both have the weights in memory and the same prompts of one length, so transformers pads nothing. Rounds alternate
A B A B; the table gives the median, the spread, and the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from headrace.backends.base import BackendOptions
from headrace.backends.torch.backend import TorchBackend
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import locate, open_checkpoint
from headrace.weights.loader import stream

Prompts = list[list[int]]


def load_headrace(path: Path, args: argparse.Namespace) -> Driver:
    checkpoint = open_checkpoint(path)
    description = describe(checkpoint.config, checkpoint.format, checkpoint.shapes())
    length = args.prompt + args.answer
    options = BackendOptions(
        dtype="float32",
        threads=args.threads,
        block_size=16,
        num_blocks=args.requests * -(-length // 16),
        max_rows=args.requests,
        max_tokens=args.requests * args.prompt,
        max_model_len=length,
    )
    backend = TorchBackend()
    capacity = backend.load(description.spec, stream(checkpoint, description.weight_map), options, Mesh())
    return Driver(backend, capacity)


def run_headrace(driver: Driver, prompts: Prompts, answer: int) -> Prompts:
    rows = [driver.admit(prompt) for prompt in prompts]
    first = driver.run(*(driver.span(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)))
    rest = driver.decode(rows, answer - 1)
    tokens = [[*first[row].tokens, *rest[row]] for row in rows]
    for row in rows:
        driver.release(row)
    return tokens


def run_transformers(model: torch.nn.Module, prompts: Prompts, answer: int) -> Prompts:
    inputs = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=answer,
            min_new_tokens=answer,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [row[inputs.shape[1] :] for row in out.tolist()]


def measure(run: Callable[[], Prompts]) -> tuple[float, Prompts]:
    began = time.perf_counter()
    tokens = run()
    return time.perf_counter() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("rounds", 4), ("requests", 32), ("prompt", 64), ("answer", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    path = Path(locate("demo"))
    driver = load_headrace(path, args)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40000, (args.requests, args.prompt), generator=generator).tolist()
    runs: dict[str, Callable[[], Prompts]] = {
        "headrace torch": lambda: run_headrace(driver, prompts, args.answer),
        "transformers eager": lambda: run_transformers(model, prompts, args.answer),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, Prompts] = {}
    for turn in range(args.rounds + 1):  # the first is a warm-up
        for name, run in runs.items():
            elapsed, tokens[name] = measure(run)
            if turn:
                seconds[name].append(elapsed)
    count = args.requests * args.answer
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20} {median:7.3f} s ({min(values):.3f} to {max(values):.3f}), {count / median:7.1f} tokens/s")
    ours, theirs = seconds.values()
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    same = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    print(
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {args.rounds} paired rounds"
    )
    print(f"{same} of {args.requests} answers have the same tokens")


if __name__ == "__main__":
    main()
