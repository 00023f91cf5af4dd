"""Workloads by name, from files of requests, made up, and written to a file and read again; on the demo model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headrace.compare.arrivals import MAX_SECONDS, ConstantGap, generator
from headrace.compare.questions import TEXT4
from headrace.compare.synthetic import Uniform, ordinary_ids, random_prompt, synthetic
from headrace.compare.traffic import ANSWERS, DEFAULT_MAX_TOKENS, PROMPTS, TIMES, read_traffic
from headrace.compare.workload_spec import ALLOWED, WorkloadOptions, read_workload, write_manifest
from headrace.compare.workloads import Workload, from_manifest
from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError, InputFileError, InvalidParameter, UnsupportedParameter
from headrace.engine.model import OpenModel
from headrace.pages.files import ReportFile

pytestmark = pytest.mark.demo

CONTEXT = 512
NONE = WorkloadOptions()
NO_PROMPT = r"^.*: prompt: got None, allowed: one of prompt, messages, token_ids, prompt_tokens$"


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Iterator[OpenModel]:
    with closing(OpenModel(EngineConfig(str(demo_path), threads=1, max_model_len=CONTEXT))) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    """A model without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 128}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, **tokens}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layer = "model.layers.0"
    names = [f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo"]
    names += [f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    tensors = {name: np.zeros((8, 8), np.float32) for name in names}
    norms = (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight")
    tensors |= {name: np.ones(8, np.float32) for name in norms}
    tensors |= {name: np.zeros((50, 8), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors")
    with closing(OpenModel(EngineConfig(str(folder), threads=1, kv_cache_mib=1))) as opened:
        yield opened


def written(folder: Path, *rows: Any, name: str = "requests.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def times(found: Workload) -> list[float]:
    return [one.arrival_s for one in found.requests]


class TestNames:
    def test_text4(self, demo: OpenModel) -> None:
        found = read_workload("text4", demo, NONE)
        assert [one.text for one in found.requests] == [question.text for question in TEXT4]
        assert found.max_tokens == DEFAULT_MAX_TOKENS and found.together and found.templated and not found.ignore_eos
        assert (found.seed, found.notes) == (None, ())
        first = [{"role": "user", "content": TEXT4[0].text}]
        assert found.prompts[0] == demo.encode(first)

    def test_text4_arrives_as_it_is_told(self, demo: OpenModel) -> None:
        options = WorkloadOptions(max_tokens=8, num_requests=10, arrivals="bursts:3:0.5")
        found = read_workload("text4", demo, options)
        assert times(found) == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1.5] and found.max_tokens == 8
        assert found.prompts[4:8] == found.prompts[:4] == read_workload("text4", demo, NONE).prompts
        assert any("4 requests are asked again" in note for note in found.notes)
        assert len(read_workload("text4", demo, WorkloadOptions(num_requests=2)).requests) == 2

    def test_synthetic(self, demo: OpenModel) -> None:
        options = WorkloadOptions(
            num_requests=20, prompt_length="uniform:5:40", output_length="uniform:3:30", arrivals="rate:10", seed=3
        )
        found = read_workload("synthetic", demo, options)
        assert found.ignore_eos and found.seed == 3 and not found.templated and len(found.requests) == 20
        assert all(5 <= len(one.token_ids) <= 40 and 3 <= one.max_tokens <= 30 for one in found.requests)
        assert len({len(one.token_ids) for one in found.requests}) > 5
        assert found == read_workload("synthetic", demo, options)
        other = read_workload("synthetic", demo, replace(options, seed=4))
        assert all(one != two for one, two in zip(found.prompts, other.prompts, strict=True))
        # What is drawn for one purpose does not change what is drawn for another.
        late = read_workload("synthetic", demo, replace(options, arrivals="poisson:3", num_requests=8))
        assert late.prompts == found.prompts[:8] and times(late)[1:] != times(found)[1:8]
        assert [one.max_tokens for one in late.requests] == [one.max_tokens for one in found.requests[:8]]

    def test_synthetic_without_options(self, demo: OpenModel) -> None:
        found = read_workload("synthetic", demo, NONE)
        assert {(len(one.token_ids), one.max_tokens) for one in found.requests} == {(64, DEFAULT_MAX_TOKENS)}
        assert len(found.requests) == 32 == len(set(found.prompts)) and found.together
        cut = read_workload("synthetic", demo, WorkloadOptions(max_tokens=9, output_length="uniform:8:10"))
        assert {one.max_tokens for one in cut.requests} == {8, 9}
        assert any("answers were cut to 9 tokens" in note for note in cut.notes)

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"prompt_length": "512"}, "prompt_length"),
            ({"prompt_length": "uniform:1:600"}, "prompt_length"),
            ({"prompt_length": "500", "output_length": "13"}, "output_length"),
            ({"speed": 2.0}, "speed"),
            ({"arrivals": "recorded"}, "arrivals"),
            ({"arrivals": "gap:86400"}, "num_requests"),
        ],
    )
    def test_synthetic_that_cannot_be(self, options: dict[str, Any], field: str, demo: OpenModel) -> None:
        with pytest.raises(InvalidParameter, match=f"^{field}: got .*, allowed: "):
            read_workload("synthetic", demo, WorkloadOptions(**options))

    def test_text4_that_cannot_be(self, demo: OpenModel) -> None:
        wrong: list[dict[str, Any]] = [{"prompt_length": "5"}, {"output_length": "5"}, {"speed": 2.0}]
        for options in (*wrong, {"arrivals": "recorded"}, {"max_tokens": CONTEXT}):
            with pytest.raises(InvalidParameter, match=f"^{next(iter(options))}: got .*, allowed: "):
                read_workload("text4", demo, WorkloadOptions(**options))

    @pytest.mark.parametrize("spec", ["", "text5", "TEXT4", "requests", "a.txt", "synthetic:3", "\0.txt"])
    def test_unknown(self, spec: str, demo: OpenModel) -> None:
        with pytest.raises(InvalidParameter) as caught:
            read_workload(spec, demo, NONE)
        assert str(caught.value) == f"workload: got {spec!r}, allowed: {ALLOWED}"

    def test_images_are_refused(self, demo: OpenModel) -> None:
        with pytest.raises(UnsupportedParameter, match=r"^workload: got 'image6', .*this model reads no images; .*do$"):
            read_workload("image6", demo, NONE)

    @pytest.mark.parametrize(
        "wrong",
        [
            *({"max_tokens": value} for value in (0, -1, 1.5, True)),
            *({"num_requests": value} for value in (0, True, 10**6)),
            *({"speed": value} for value in (0, -1, float("nan"), float("inf"), 10**400, True, "2")),
            *({"seed": value} for value in (-1, 1.5, 2**63)),
            *({"arrivals": value} for value in ("poisson:0", "nonsense")),
            *({"prompt_length": "0"}, {"output_length": "uniform:2:1"}),
        ],
    )
    def test_options_that_cannot_be(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidParameter, match=f"^{next(iter(wrong))}: got .*, allowed: "):
            WorkloadOptions(**wrong)


class TestOrdinaryTokens:
    def test_none_is_special(self, demo: OpenModel) -> None:
        ids = ordinary_ids(demo)
        assert list(ids) == sorted(set(ids)) and len(ids) > 45_000
        assert not demo.vocabulary().special & set(ids) and not demo.eos_token_ids & set(ids)
        for token_id in random_prompt(ids, 200, 1, 0):
            text = demo.tokenizer.decode([token_id], skip_special_tokens=True)
            assert text and "\ufffd" not in text

    def test_without_a_tokenizer(self, tiny: OpenModel) -> None:
        assert not tiny.has_text and tiny.eos_token_ids == {2, 5}
        assert set(ordinary_ids(tiny)) == set(range(tiny.spec.vocab_size)) - {0, 1, 2, 5}
        found = synthetic(tiny, 3, Uniform(2, 9), Uniform(1, 4), ConstantGap(1), 0)
        assert all(set(prompt) <= set(ordinary_ids(tiny)) for prompt in found.prompts)

    def test_prompts_are_pinned_and_even(self) -> None:
        assert random_prompt(range(100), 8, 7, 0) == PINNED
        assert random_prompt(range(100), 3, 7, 0) == PINNED[:3]
        assert random_prompt(range(100), 8, 7, 1) != PINNED
        counted = Counter(random_prompt(range(4), 20_000, 7, 0))
        assert all(abs(counted[index] / 20_000 - 0.25) < 0.015 for index in range(4))
        assert generator(7, "prompt 0").random() == generator(7, "prompt 0").random()


PINNED = (97, 79, 0, 69, 91, 81, 72, 95)


class TestFiles:
    def test_every_kind_of_prompt(self, demo: OpenModel, tmp_path: Path) -> None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        rows = [
            {"prompt": "Hello", "title": "greeting"},
            {"messages": messages, "max_tokens": 7},
            {"token_ids": [100, 200, 300], "max_tokens": 5.0},
            {"Prompt token IDs": [100, 200], "colour": "red", "max_tokens": None},
        ]
        found = read_workload(written(tmp_path, "\ufeff" + json.dumps(rows[0]), "", *rows[1:]), demo, NONE)
        prompts = (demo.encode([messages[1]]), demo.encode(messages), (100, 200, 300), (100, 200))
        assert found.prompts == prompts
        assert [one.max_tokens for one in found.requests] == [DEFAULT_MAX_TOKENS, 7, 5, DEFAULT_MAX_TOKENS]
        assert found.requests[0].title == "greeting" and found.requests[0].text == "Hello"
        assert found.requests[1].text == "system: Be brief.\nuser: Hello" and found.requests[2].text == ""
        assert found.templated and not found.ignore_eos and found.together and found.seed is None
        assert found.name == "requests.jsonl"
        assert any("not used: 'colour'" in note for note in found.notes)
        assert any("how long 2 of 4 answers are: 96 tokens at most" in note for note in found.notes)

    def test_what_nobody_asked_for_gives_way_to_the_context(self, demo: OpenModel, tmp_path: Path) -> None:
        path = written(tmp_path, {"token_ids": [100] * (CONTEXT - 10)})
        assert read_workload(path, demo, NONE).max_tokens == 10
        with pytest.raises(InputFileError, match=r"line 1: max_tokens: got 11, allowed: 1 to 10, the room"):
            read_workload(path, demo, WorkloadOptions(max_tokens=11))

    def test_options(self, demo: OpenModel, tmp_path: Path) -> None:
        path = written(tmp_path, {"prompt": "a", "max_tokens": 50}, {"prompt": "b"}, {"prompt": "c", "max_tokens": 5})
        found = read_workload(path, demo, WorkloadOptions(max_tokens=20, num_requests=5, arrivals="gap:2"))
        assert [one.max_tokens for one in found.requests] == [20, 20, 5, 20, 20]
        assert times(found) == [0, 2, 4, 6, 8] and found.prompts[3:] == found.prompts[:2]
        assert any("1 of 3 answers were cut to 20 tokens" in note for note in found.notes)
        assert len(read_workload(path, demo, WorkloadOptions(num_requests=2)).requests) == 2
        for options in ({"arrivals": "recorded"}, {"speed": 2.0}, {"prompt_length": "5"}, {"output_length": "5"}):
            with pytest.raises(InvalidParameter, match=f"^{next(iter(options))}: got .*, allowed: "):
                read_workload(path, demo, WorkloadOptions(**options))

    def test_times_are_sorted_and_relative(self, demo: OpenModel, tmp_path: Path) -> None:
        rows = [{"prompt": text, "arrival_s": at} for text, at in (("c", 12.5), ("a", 10), ("b", 10.25), ("d", 12.5))]
        path = written(tmp_path, *rows)
        found = read_workload(path, demo, NONE)
        assert times(found) == [0, 0.25, 2.5, 2.5] and [one.text for one in found.requests] == list("abcd")
        assert found == read_workload(path, demo, WorkloadOptions(arrivals="recorded"))
        faster = read_workload(path, demo, WorkloadOptions(speed=10))
        assert (
            times(faster) == [0, 0.025, 0.25, 0.25] and "Requests arrive as recorded, 10 times as fast." in faster.notes
        )
        assert read_workload(path, demo, WorkloadOptions(arrivals="at-once")).together
        assert [one.text for one in read_workload(path, demo, WorkloadOptions(num_requests=2)).requests] == ["a", "c"]
        for options in (WorkloadOptions(num_requests=5), WorkloadOptions(speed=2, arrivals="at-once")):
            with pytest.raises(InvalidParameter, match=r"^(num_requests|speed): got .*, allowed: "):
                read_workload(path, demo, options)

    def test_a_recording_of_a_week_is_not_replayed_as_it_was(self, demo: OpenModel, tmp_path: Path) -> None:
        path = written(tmp_path, {"prompt": "a", "timestamp": 0}, {"prompt": "b", "timestamp": 7 * MAX_SECONDS})
        with pytest.raises(InvalidParameter, match=r"^speed: got 1.0, allowed: 7 or more, for 604800 recorded seconds"):
            read_workload(path, demo, NONE)
        assert times(read_workload(path, demo, WorkloadOptions(speed=7))) == [0, MAX_SECONDS]
        assert read_workload(path, demo, WorkloadOptions(arrivals="at-once")).together


class TestPublicTraces:
    def test_azure(self, demo: OpenModel, tmp_path: Path) -> None:
        rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,10", ""]
        path = written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", *rows, name="azure.csv")
        found = read_workload(path, demo, NONE)
        assert times(found) == [0, 4.314579] and [len(prompt) for prompt in found.prompts] == [374, 396]
        assert [one.max_tokens for one in found.requests] == [44, 10] and found.ignore_eos and found.seed == 0
        assert set(found.prompts[0]) <= set(ordinary_ids(demo)) and found.prompts[0][:9] != found.prompts[1][:9]
        other = read_workload(path, demo, WorkloadOptions(seed=1))
        assert other.prompts != found.prompts and other.seed == 1

    def test_burst_gpt(self, demo: OpenModel, tmp_path: Path) -> None:
        header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
        rows = ["5,ChatGPT,47,18,65,Conversation log", "45.5,GPT-4,44,0,44,API log", "118,GPT-4,72,31,103,API log"]
        found = read_workload(written(tmp_path, header, *rows, name="burst.CSV"), demo, NONE)
        assert times(found) == [0, 113] and [one.max_tokens for one in found.requests] == [18, 31]
        assert any("Left out, since their recorded answers have 0 tokens: 1." in note for note in found.notes)
        assert any("'Model', 'Total tokens', 'Log Type'" in note for note in found.notes)

    def test_mooncake(self, demo: OpenModel, tmp_path: Path) -> None:
        rows = [
            {"timestamp": 27482, "input_length": 69, "output_length": 52, "hash_ids": [46, 47]},
            {"timestamp": 30535, "input_length": 64, "output_length": 26, "hash_ids": [46, 48]},
        ]
        found = read_workload(written(tmp_path, *rows), demo, NONE)
        assert times(found) == [0, 3.053] and [len(prompt) for prompt in found.prompts] == [69, 64]
        assert "The file has its times as timestamp in milliseconds." in found.notes
        plain = [{"timestamp": row["timestamp"], "prompt_tokens": 3} for row in rows]
        assert times(read_workload(written(tmp_path, *plain), demo, NONE)) == [0, 3053]
        named = [{"timestamp_ms": row["timestamp"], "prompt_tokens": 3} for row in rows]
        assert times(read_workload(written(tmp_path, *named), demo, NONE)) == [0, 3.053]

    def test_zones(self, demo: OpenModel, tmp_path: Path) -> None:
        stamps = ("2024-05-10T02:00:00+02:00", "2024-05-10 00:00:01", "2024-05-10T00:00:02.5Z")
        rows = [{"prompt": "x", "timestamp": stamp} for stamp in stamps]
        assert times(read_workload(written(tmp_path, *rows), demo, NONE)) == [0, 1, 2.5]


GOOD = {"prompt": "Hello", "max_tokens": 5, "arrival_s": 1}


class TestBadFiles:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{}", NO_PROMPT),
            ('{"max_tokens": 5}', NO_PROMPT),
            ('{"prompt": null}', NO_PROMPT),
            ("not json", r": not JSON: Expecting value at character 0"),
            ("[1]", r": got \[1\], allowed: a JSON object"),
            ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
            ('{"prompt": "a", "Prompt": "b"}', "Prompt: got 'b', allowed: to leave it out beside prompt, the same"),
            ({"prompt": ""}, "prompt: got '', allowed: a text"),
            ({"prompt": 7}, "prompt: got 7, allowed: a text"),
            ({"prompt": ["a"]}, "prompt: got "),
            ({"prompt": "\ud800"}, "prompt: a lone surrogate"),
            ({"prompt": "a", "messages": []}, r"messages: got \[\], allowed: to leave it out beside prompt"),
            ({"prompt": "a", "prompt_tokens": 5}, "prompt_tokens: got 5, allowed: to leave it out beside prompt"),
            ({"messages": []}, "messages: got "),
            ({"messages": [{"role": "user"}]}, r"messages\[0\].content: got None"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\]: got .*image_url"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
                r"messages\[0\]\.content\[0\]\.type: got 'an image'.*reads no images",
            ),
            ({"token_ids": []}, r"token_ids: got \[\]"),
            ({"token_ids": "abc"}, "token_ids: got 'abc'"),
            ({"token_ids": [1, True]}, "token_ids: got "),
            ({"token_ids": [49152]}, "token_ids: got 49152, allowed: integers from 0 to 49151"),
            ({"token_ids": [1] * CONTEXT}, f"maximum context length is {CONTEXT} tokens"),
            ({"prompt": "a " * 100_000}, f"maximum context length is {CONTEXT} tokens"),
            ({"prompt_tokens": CONTEXT}, f"prompt_tokens: got {CONTEXT}, allowed: 1 to {CONTEXT - 1} tokens"),
            ({"prompt_tokens": 10**15}, "prompt_tokens: got 1000000000000000, allowed: 1 to"),
            ({"prompt_tokens": 0}, "prompt_tokens: got 0"),
            ({"prompt_tokens": "9"}, "prompt_tokens: got '9'"),
            ({"prompt": "a", "max_tokens": 0}, "max_tokens: got 0, allowed: .* an integer from 1"),
            ({"prompt": "a", "max_tokens": True}, "max_tokens: got True"),
            ({"prompt": "a", "max_tokens": 1.5}, "max_tokens: got 1.5"),
            ({"prompt": "a", "max_tokens": CONTEXT}, f"max_tokens: got {CONTEXT}, allowed: 1 to .* the room"),
            ({"prompt": "a", "max_tokens": 5, "output_tokens": 5}, "output_tokens: got 5, allowed: to leave it out"),
            ({"prompt_tokens": 9, "output_length": -1}, "output_length: got -1"),
            ({"prompt": "a", "title": 5}, "title: got 5, allowed: a string"),
            ({"prompt": "a", "arrival_s": "soon"}, "arrival_s: got 'soon', allowed: a number"),
            ({"prompt": "a", "arrival_s": True}, "arrival_s: got True"),
            ({"prompt": "a", "arrival_s": 1e300}, "arrival_s: got 1e[+]300"),
            ('{"prompt": "a", "arrival_s": NaN}', "not JSON: the number NaN is not finite"),
            ('{"prompt": "a", "arrival_s": 1e999}', "not finite"),
            ({"prompt": "a", "arrival_s": 1, "timestamp": 1}, "timestamp: got 1, allowed: to leave it out beside"),
        ],
    )
    def test_a_line(self, line: object, message: str, demo: OpenModel, tmp_path: Path) -> None:
        """Behind one that is good, and like it in what all lines have to share."""
        row = line if isinstance(line, dict) else {}
        timed = {"arrival_s": 1} if set(row) & set(TIMES) else {}
        good = {"prompt_tokens": 9} if set(row) == {"prompt_tokens"} else {"prompt": "Hello"}
        path = written(tmp_path, good | timed, "", line)
        with pytest.raises(InputFileError, match=message) as caught:
            read_workload(path, demo, NONE)
        assert str(caught.value).startswith(f"{path}, line 3: ") and str(caught.value).count("line 3") == 1
        assert "\n" not in str(caught.value) and len(str(caught.value)) < len(path) + 400

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (GOOD, {"prompt": "b"}, "time: got None, allowed: arrival_s in seconds, as in line 1"),
            ({"prompt": "a"}, GOOD, "time: got 'arrival_s in seconds', allowed: to leave it out, as in line 1"),
            (GOOD, {"prompt": "b", "arrival_s": "2024-05-10"}, "arrival_s in ISO 8601"),
            ({"prompt": "a", "output_tokens": 5}, {"prompt": "b"}, "answer: got 'no more than max_tokens', allowed: a"),
            ({"prompt": "a"}, {"prompt_tokens": 5}, "answer: got 'a recorded length"),
        ],
    )
    def test_lines_that_differ(
        self, first: object, second: object, message: str, demo: OpenModel, tmp_path: Path
    ) -> None:
        path = written(tmp_path, first, second)
        with pytest.raises(InputFileError, match=message) as caught:
            read_workload(path, demo, NONE)
        assert str(caught.value).startswith(f"{path}, line 2: ")

    def test_a_file(self, demo: OpenModel, tmp_path: Path) -> None:
        folder = tmp_path / "folder.jsonl"
        folder.mkdir()
        binary = tmp_path / "binary.jsonl"
        binary.write_bytes(b'{"prompt": "a"}\n\xff\xfe\n')
        cases = {
            str(tmp_path / "none.jsonl"): "no such file",
            str(folder): "not a regular file",
            written(tmp_path, name="empty.jsonl"): "no requests, allowed: at least one line with one of prompt",
            written(tmp_path, "a,b", name="header.csv"): "no requests, allowed",
            written(tmp_path, {"prompt_tokens": 1, "output_tokens": 0}): "no requests but 1 without an answer",
            str(binary): "line 2: not UTF-8 at byte 0",
            written(tmp_path, "prompt,prompt", "a,b", name="twice.csv"): "line 2: header: got 'prompt'",
            written(tmp_path, "prompt,max_tokens", "a", name="short.csv"): "line 2: columns: got 1, allowed: 2, as in",
            written(tmp_path, "prompt", '"a', name="open.csv"): "line 2: not CSV: unexpected end of data",
            written(tmp_path, "prompt,max_tokens", "a,five", name="word.csv"): "line 2: max_tokens: got 'five'",
            written(tmp_path, "token_ids", "5", name="ids.csv"): "line 2: token_ids: got '5'",
        }
        for path, message in cases.items():
            with pytest.raises(InputFileError) as caught:
                read_workload(path, demo, NONE)
            assert str(caught.value).startswith(path) and message in str(caught.value)

    def test_text_needs_a_tokenizer(self, tiny: OpenModel, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match=r"line 1: this model has no tokenizer"):
            read_workload(written(tmp_path, {"prompt": "a"}), tiny, NONE)
        found = read_workload(written(tmp_path, {"token_ids": [7, 8]}, {"token_ids": [9], "max_tokens": 3}), tiny, NONE)
        assert found.prompts == ((7, 8), (9,)) and not found.templated


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from([*PROMPTS, *ANSWERS, *TIMES, "title", "hash_ids", "Prompt"]), json_values)
junk = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace"))
contents = st.lists(junk | rows.map(lambda row: json.dumps(row).encode()), max_size=4).map(b"\n".join)
quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(contents, st.sampled_from([".jsonl", ".csv", ".json"]))
def test_any_file_is_read_or_refused(demo: OpenModel, tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(content)
    try:
        found = read_workload(str(path), demo, NONE)
    except HeadraceError as error:
        assert str(error).startswith((str(path), "speed: ")) and "\n" not in str(error)
    else:
        assert times(found) == sorted(times(found)) and times(found)[0] == 0 and found.longest <= CONTEXT


def planted(demo: OpenModel) -> Workload:
    return read_workload("synthetic", demo, WorkloadOptions(num_requests=4, arrivals="poisson:0.1", max_tokens=5))


class TestManifest:
    def test_a_run_can_be_repeated(self, demo: OpenModel, tmp_path: Path) -> None:
        path = tmp_path / "again.json"
        for asked in (planted(demo), read_workload("text4", demo, NONE)):
            write_manifest(asked, ReportFile("manifest", str(path)))
            again = read_workload(str(path), demo, NONE)
            assert again == asked and again.sha256 == asked.sha256
        for options in ({"max_tokens": 5}, {"arrivals": "at-once"}, {"seed": 1}, {"num_requests": 2}):
            with pytest.raises(InvalidParameter, match=f"^{next(iter(options))}: got .*is run as it is"):
                read_workload(str(path), demo, WorkloadOptions(**options))

    @pytest.mark.parametrize(
        ("where", "value", "message"),
        [
            (("format",), "headrace-workload/2", "format: got 'headrace-workload/2', allowed: headrace-workload/1"),
            (("sha256",), None, "sha256: got None, allowed: [0-9a-f]{64}, of what the requests are now"),
            (("ignore_eos",), False, "sha256: got '[0-9a-f]{60,64}.*, allowed: [0-9a-f]{64}, of"),
            (("requests", 1, "token_ids", 0), 7, "sha256: got "),
            (("requests", 1, "arrival_s"), 0, "sha256: got "),
            (("requests", 0, "max_tokens"), 4, "sha256: got "),
            (("requests", 1, "arrival_s"), 99, r"requests\[2\].arrival_s: got .*, allowed: 99 or later"),
            (("requests", 2, "arrival_s"), -1, r"requests\[2\].arrival_s: got -1, allowed: a finite number"),
            (("requests", 2, "max_tokens"), 0, r"requests\[2\].max_tokens: got 0, allowed: an integer from 1"),
            (("requests", 2, "token_ids"), [], r"requests\[2\].token_ids: got \[\], allowed"),
            (("requests", 2), 5, r"requests\[2\]: got 5, allowed: an object"),
            (("requests",), [], r"requests: got \[\], allowed: a list of at least one request"),
            (("temperature",), 0.5, "temperature: got 0.5, allowed: 0"),
            (("seed",), "7", "seed: got '7', allowed: an integer or null"),
            (("notes",), [1], r"notes: got \[1\], allowed"),
            (("name",), "\ud800", "name: a lone surrogate"),
        ],
    )
    def test_a_changed_one_is_refused(
        self, where: tuple[Any, ...], value: object, message: str, demo: OpenModel, tmp_path: Path
    ) -> None:
        manifest = json.loads(json.dumps(planted(demo).manifest()))
        inside = manifest
        for key in where[:-1]:
            inside = inside[key]
        inside[where[-1]] = value
        path = written(tmp_path, manifest, name="changed.json")
        with pytest.raises(InputFileError, match=message) as caught:
            read_workload(path, demo, NONE)
        assert str(caught.value).startswith(f"{path}: ")

    def test_one_of_another_model_is_refused(self, demo: OpenModel, tiny: OpenModel, tmp_path: Path) -> None:
        asked = planted(demo)
        path = tmp_path / "again.json"
        write_manifest(asked, ReportFile("manifest", str(path)))
        with pytest.raises(InputFileError, match=r"requests\[0\].token_ids: got .*, allowed: 0 to 49, the tokens"):
            read_workload(str(path), tiny, NONE)
        longer = replace(asked, requests=(replace(asked.requests[0], max_tokens=CONTEXT), *asked.requests[1:]))
        write_manifest(longer, ReportFile("manifest", str(path)))
        with pytest.raises(InputFileError, match=rf"requests\[0\].max_tokens: got {CONTEXT}, allowed: 1 to 448"):
            read_workload(str(path), demo, NONE)
        with pytest.raises(InputFileError, match="no such file"):
            read_workload(str(tmp_path / "none.json"), demo, NONE)

    def test_times_that_are_integers_have_the_same_hash(self) -> None:
        one = {"token_ids": [1], "max_tokens": 1, "arrival_s": 0, "title": "", "text": ""}
        made = {"format": "headrace-workload/1", "name": "x", "temperature": 0, "ignore_eos": True, "templated": False}
        made |= {"seed": None, "notes": [], "requests": [one]}
        with pytest.raises(InvalidParameter) as caught:
            from_manifest(made)
        sha256 = str(caught.value).partition("allowed: ")[2][:64]
        assert from_manifest({**made, "sha256": sha256}).manifest()["sha256"] == sha256


def test_a_big_file_is_read_as_far_as_it_is_needed(demo: OpenModel, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt_tokens": 3}, {"prompt_tokens": 4}, "broken")
    found = read_traffic(Path(path), demo, num_requests=2)
    assert [len(prompt) for prompt in found.prompts] == [3, 4] and found.max_tokens == DEFAULT_MAX_TOKENS
