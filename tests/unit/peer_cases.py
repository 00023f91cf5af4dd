"""A small outside engine in a real process, and tasks for it."""

from __future__ import annotations

import os
from typing import Any

from headrace.compare.peers import DRIVERS

FAKE = f"""
import os, runpy, sys, time
from pathlib import Path

class Engine:
    '''Counts on from the last token of the prompt; token 13 is unlucky, 99 hangs, 77 goes on after its end.'''
    def load(self, task):
        print("a library says hello on stdout")
        os.system("echo native chatter")
        if task["model"] == "missing":
            raise ValueError("no such\\nmodel")
        return {{"versions": {{"fake": "1"}}, "weights_bytes": 1000, "scheduling": "continuous", "settings": {{}}}}

    def run(self, run):
        live = []
        while live or run.waiting:
            live += run.arrived() if live else run.wait()
            for asked in live:
                if 13 in asked.token_ids:
                    print("bad luck", file=sys.stderr, flush=True)
                    os._exit(3)
                if 99 in asked.token_ids:
                    time.sleep(60)
                if 55 in asked.token_ids:
                    return
                last = (asked.token_ids + asked.output)[-1]
                run.take(asked, [last + 1, last + 2])
            live = [asked for asked in live if not asked.done]

runpy.run_path({str(DRIVERS / "serve.py")!r})["serve"](Engine())
"""
LOAD: dict[str, Any] = {
    "op": "load",
    "model": "m",
    "precision": "p",
    "threads": 1,
    "max_len": 9,
    "padded_len": 9,
    "max_requests": 4,
}


def task(*prompts: list[int], max_tokens: int = 3, gap_s: float = 0.0) -> dict[str, Any]:
    requests = [
        {"id": f"r{i}", "token_ids": ids, "max_tokens": max_tokens, "at_s": i * gap_s} for i, ids in enumerate(prompts)
    ]
    return {"op": "run", "requests": requests, "sampling": {"temperature": 0}}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
