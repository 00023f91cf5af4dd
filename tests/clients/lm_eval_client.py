"""lm-eval, unchanged: the same local tasks through the server and with `--model hf` on the same float32 weights.

    python lm_eval_client.py URL FOLDER

URL: a server of the model in FOLDER. Compared are the scores, each choice's log-likelihood and each generated text.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, FOLDER = sys.argv[1:3]
QUESTIONS = (
    ("The capital of France is", ["Paris", "Rome", "Berlin", "a fish"], 0),
    ("Two plus two is", ["five", "four", "a colour", "ninety"], 1),
    ("The opposite of hot is", ["warm", "red", "cold", "up"], 2),
    ("A dog is an", ["animal", "engine", "ocean", "idea of the moon"], 0),
    ("The sun rises in the", ["west", "night", "east", "kitchen"], 2),
    ("Water freezes at zero degrees", ["Celsius", "Paris", "monkeys", "of taste"], 0),
    ("Shakespeare wrote the play", ["Hamlet", "Windows", "Faust", "Tosca"], 0),
    ("Naïve café — 漢字 🙂 is", ["text", "a number", "🙂", "nothing"], 0),
    ("The largest planet is", ["Mars", "Jupiter", "Venus", "the Moon"], 1),
    ("Bees make", ["milk", "honey", "bread", "steel"], 1),
)
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 16, do_sample: false, temperature: 0.0}
filter_list: [{name: first_word, filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true}]
"""
ROLLING = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}, and so on. {{question}} {{choices[answer]}}."
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TASKS = {"local_choices": CHOICES, "local_generate": GENERATE, "local_perplexity": ROLLING}
CLOSE = 2e-3
"""Of a log-likelihood, in nats: both sum float32 values, in another order."""


def evaluate(folder: Path, name: str, model: str, arguments: str, tasks: str) -> tuple[dict, dict]:
    """(scores, samples by task) of one run of the command."""
    command = [str(Path(sys.executable).with_name("lm-eval")), "run", "--model", model, "--model_args", arguments]
    command += [
        "--device",
        "cpu",
        "--include_path",
        str(folder),
        "--tasks",
        tasks,
        "--output_path",
        str(folder / name),
        "--log_samples",
    ]
    offline = {
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "OPENAI_API_KEY": "x",
    }
    done = subprocess.run([*command, "--seed", "1234"], env={**os.environ, **offline}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lm-eval with {model}: exit {done.returncode}\n{done.stderr[-3000:]}")
    results = json.loads(next((folder / name).rglob("results_*.json")).read_text())["results"]
    samples = {}
    for task in tasks.split(","):
        file = next((folder / name).rglob(f"samples_{task}_*.jsonl"))
        samples[task] = sorted((json.loads(line) for line in file.open()), key=lambda one: one["doc_id"])
    return results, samples


def same(task: str, served: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    """Raises AssertionError where scores differ, or what they are made of."""
    for metric, value in served[0][task].items():
        wanted = other[0][task][metric]
        close = wanted == value or (isinstance(value, float) and math.isclose(value, wanted, rel_tol=1e-3))
        assert close or metric.partition(",")[0].endswith("stderr"), f"{task} {metric}: {value}, and {wanted} with hf"
    worst = 0.0
    for ours, theirs in zip(served[1][task], other[1][task], strict=True):
        for one, two in zip(flat(ours["resps"]), flat(theirs["resps"]), strict=True):
            if isinstance(one, float) and isinstance(two, float):
                worst = max(worst, abs(one - two))
            else:
                assert one == two, f"{task}: {one!r}, and {two!r} with hf"
    assert worst <= CLOSE, f"{task}: log-likelihoods differ by {worst}"
    values = {name.partition(",")[0]: value for name, value in served[0][task].items() if "," in name}
    scores = {name: round(value, 4) for name, value in values.items() if not name.endswith("stderr")}
    print(f"ok: {task} {scores}, log-likelihoods within {worst:.0e}")


def flat(value: object) -> list:
    """Numbers and texts in it; lm-eval writes some numbers as text."""
    if isinstance(value, list):
        return [one for inside in value for one in flat(inside)]
    try:
        return [float(value)]
    except (TypeError, ValueError):
        return [value]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "local.jsonl"
        rows = ({"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for task, text in TASKS.items():
            (folder / f"{task}.yaml").write_text(text.replace("DATA", str(data)))
        server = f"model=demo-f32,base_url={URL}/v1/completions,num_concurrent=4,max_length=2048"
        tasks = ",".join(TASKS)
        other = evaluate(folder, "hf", "hf", f"pretrained={FOLDER},dtype=float32,max_length=2048", tasks)
        served = evaluate(
            folder, "ids", "local-completions", f"{server},tokenizer={FOLDER},tokenized_requests=True", tasks
        )
        for task in TASKS:
            same(task, served, other)
        remote = f"{server},tokenizer_backend=remote,tokenized_requests=True"
        served = evaluate(folder, "remote", "local-completions", remote, "local_choices")
        print("with the server's own tokenizer:")
        same("local_choices", served, other)


main()
