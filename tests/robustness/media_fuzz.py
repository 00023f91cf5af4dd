"""Damaged pictures and bombs, decoded and cut to tiles in a process of their own: none ends it, each refusal is an
InvalidImage with a reason, and memory stays within bounds.

    python -m tests.robustness.media_fuzz [--short] [--json FILE]

Half of all files have one change, the others up to four; those of PNG have checksums that fit, mostly, so that
what reads behind them meets the change. Bombs are files whose decoding would cost much more than they weigh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.core.errors import InvalidImage
from headrace.core.spec import TilingSpec
from headrace.media.limits import MediaLimits
from headrace.media.prepare import prepare
from tests.robustness.media_samples import Bomb, bombs, mutated, samples
from tests.robustness.score import Score, finish

MUTATIONS, SHORT_MUTATIONS = 5000, 300
BOMBS = 50
MOST_MB = 128
MOST_CPU_S = 5.0
TILING = TilingSpec(448, 1, 12, thumbnail=True)
LEAK = re.compile(r"0x[0-9a-f]{6,}|object at|Traceback|/[a-z]+/[a-z]|\n")


def cases(count: int, heavy: bool, seed: int = 0) -> Iterator[Bomb]:
    """So many damaged files, and the bombs."""
    draw = random.Random(seed)
    good = samples()
    for index in range(count):
        name, data = draw.choice(list(good.items()))
        yield Bomb(f"{index}: {name}", mutated(draw, data, list(good.values())), False)
    yield from bombs(heavy)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few seconds' part of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.decode:
        return decode_all(given.decode)
    score = Score("media fuzz")
    attack(score, SHORT_MUTATIONS if given.short else MUTATIONS, not given.short)
    return finish(score, given.json)


def attack(score: Score, count: int, heavy: bool) -> None:
    """Has so many damaged files and the bombs decoded in another process, and says what came of it."""
    known: list[tuple[str, bool]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cases")
        with path.open("wb") as file:
            for one in cases(count, heavy):
                known.append((one.what, one.refused))
                file.write(struct.pack("<I", len(one.data)) + one.data)
        command = [sys.executable, "-m", "tests.robustness.media_fuzz", "--decode", str(path)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[2])
    found = [json.loads(line) for line in child.stdout.splitlines()]
    tell(score, known, found, child.returncode, count)


def tell(score: Score, known: list[tuple[str, bool]], found: list[dict[str, Any]], ended: int, mutations: int) -> None:
    """A line for each number that must be passed."""
    outcomes = Counter(one["outcome"] for one in found)
    score.note(f"{mutations} damaged files and {len(known) - mutations} bombs: {dict(outcomes)}")
    score.check("files that the process lived to answer", len(found), len(known), len(found) == len(known))
    score.check("the process's exit status", ended, 0, ended == 0)
    score.check("bombs", len(known) - mutations, f"≥ {BOMBS}", len(known) - mutations >= BOMBS)
    faults = [
        f"{what}: {one['told']}" for (what, _), one in zip(known, found, strict=False) if one["outcome"] == "fault"
    ]
    score.zero("refusals that are no InvalidImage of one line, with field and reason", len(faults), len(found))
    missed = [
        what for (what, refused), one in zip(known, found, strict=False) if refused and one["outcome"] != "refused"
    ]
    score.zero("bombs decoded that must be refused", len(missed), sum(refused for _, refused in known))
    worst = max(zip(known, found, strict=False), key=lambda pair: pair[1]["peak_mb"])
    slowest = max(zip(known, found, strict=False), key=lambda pair: pair[1]["cpu_s"])
    score.at_most(f"most memory above the start ({worst[0][0]})", worst[1]["peak_mb"], MOST_MB, "MB")
    score.at_most(f"most CPU time ({slowest[0][0]})", slowest[1]["cpu_s"], MOST_CPU_S)
    for name, some in (("fault", faults), ("missed", missed)):
        for one in some[:10]:
            score.note(f"{name}: {one}")


# ---------------------------------------------------------------- the other process


def decode_all(path: Path) -> int:
    """Answers with a line of JSON for each file in `path`."""
    warm = list(samples().values())
    for data in warm:
        prepare(data, TILING, MediaLimits())
    start = memory("VmRSS")
    with path.open("rb") as file:
        while head := file.read(4):
            data = file.read(struct.unpack("<I", head)[0])
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # The peak is what memory is now.
            begun = time.process_time()
            outcome, told = attempt(data)
            line = {"outcome": outcome, "told": told, "cpu_s": time.process_time() - begun}
            print(json.dumps(line | {"peak_mb": (memory("VmHWM") - start) / 1e6}), flush=True)
    return 0


def attempt(data: bytes) -> tuple[str, str]:
    """What comes of a file: picture, refused, or fault; and what is said of it."""
    try:
        prepare(data, TILING, MediaLimits(), "messages[0].content[1]")
    except InvalidImage as error:
        text = str(error)
        good = text.startswith("messages[0].content[1]: got ") and "allowed: " in text and not LEAK.search(text)
        return "refused" if good and error.code == "invalid_image" else "fault", text
    except Exception as error:
        return "fault", repr(error)
    return "picture", ""


def memory(name: str) -> int:
    """Bytes of this process, as the system counts them: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
