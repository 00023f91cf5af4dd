"""guidellm, unchanged, with synthetic text: python guidellm_client.py URL FOLDER (of the tokenizer)"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, FOLDER = sys.argv[1:3]
REQUESTS, OUTPUT_TOKENS = 6, 12


def run(folder: Path, request_format: str) -> None:
    output = folder / f"{request_format.strip('/').replace('/', '-')}.json"
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={URL},request_format={request_format}"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens=24,output_tokens={OUTPUT_TOKENS}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={FOLDER}", "--output", f"kind=json,path={output}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, cwd=folder)
    if done.returncode or not output.exists():
        raise SystemExit(f"guidellm: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    requests = benchmark["requests"]
    counts = {name: len(requests[name]) for name in ("successful", "errored", "incomplete")}
    assert counts["successful"] >= REQUESTS and not counts["errored"] + counts["incomplete"], counts
    tokens = [one["output_metrics"]["text_tokens"] for one in requests["successful"]]
    assert tokens == [OUTPUT_TOKENS] * len(tokens), tokens
    print(f"ok: {request_format} {counts['successful']} requests of {OUTPUT_TOKENS} tokens, none failed")


with tempfile.TemporaryDirectory() as name:
    for request_format in ("/v1/chat/completions", "/v1/completions"):
        run(Path(name), request_format)
