"""What an image costs before its first token: random weights of InternViT-300M's true shape before a small decoder, the
same tiles and token ids through headrace and through transformers' InternVLForConditionalGeneration, rounds in turn:

    python -m benchmarks.vision --tiles 1 3 --rounds 5 --threads 2

float32, greedy, one token: nearly all of the time is the vision tower's. The tokens are compared. Needs 4 GB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from headrace.core.spec import TilingSpec
from headrace.engine.images import ImagePrompt
from headrace.engine.llm import LLM
from headrace.media.prepare import prepare_values
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint

SIDE, TOKENS = 448, 256
TOWER = {
    "image_size": [SIDE, SIDE],
    "patch_size": [14, 14],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
DECODER = {"max_position_embeddings": 4096}
BESIDE = 8
"""Tokens of text before the image and after it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_vision_checkpoint(
            Path(folder), "internvl_300m_hf", text=DECODER, vision=TOWER, config={"image_seq_length": TOKENS}
        )
        model = transformers.InternVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        settings: dict[str, Any] = {"threads": arguments.threads, "prefix_cache": False, "max_model_len": 4096}
        with LLM(str(path), **settings) as llm:
            for tiles in arguments.tiles:
                compare(llm, model, tiles, arguments.rounds)


def compare(llm: LLM, model: Any, tiles: int, rounds: int) -> None:
    """Prints a line for an image of so many tiles."""
    values = np.random.default_rng(tiles).normal(size=(tiles, 3, SIDE, SIDE)).astype(np.float32)
    pad = int(model.config.image_token_id)
    text = list(range(10, 10 + BESIDE))
    ids = [*text, *[pad] * (tiles * TOKENS), *text]
    image = prepare_values(values, TilingSpec(SIDE))

    def ours() -> int:
        (answer,) = llm.generate(ImagePrompt(ids, [image]), max_tokens=1, ignore_eos=True, progress=False)
        if answer.error is not None:
            raise SystemExit(str(answer.error))
        return answer.token_ids[0]

    def theirs() -> int:
        with torch.inference_mode():
            found = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                pixel_values=torch.from_numpy(values),
                max_new_tokens=1,
                do_sample=False,
            )
        return int(found[0, -1])

    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds + 1)][1:]  # the first warms up
    if any(mine[1] != other[1] for mine, other in pairs):
        raise SystemExit(f"{tiles} tiles: the tokens differ")
    ratios = sorted(other[0] / mine[0] for mine, other in pairs)
    seconds = [median(run[0] for run in runs) for runs in zip(*pairs, strict=True)]
    print(
        f"{tiles} tiles: headrace {seconds[0]:.2f} s, transformers {seconds[1]:.2f} s; ratio {median(ratios):.2f} "
        f"({ratios[0]:.2f}–{ratios[-1]:.2f}) over {rounds} rounds, the same token"
    )


def timed(run: Callable[[], int]) -> tuple[float, int]:
    """(seconds, token)"""
    began = time.perf_counter()
    token = run()
    return time.perf_counter() - began, token


if __name__ == "__main__":
    main()
