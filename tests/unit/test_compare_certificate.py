"""Certificates: what they hold, how strictly they are read, and that a check names exactly what was changed."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.certificate import (
    SEALED,
    hash_weights,
    margin_summary,
    prompts_sha256,
    seals,
    tokenizer_sha256,
    tokens_sha256,
    weight_paths,
)
from headrace.compare.certificate_reader import read_certificate
from headrace.compare.check import CheckResult, Kind, changed_parts, check, conclusion, engine_settings, show
from headrace.compare.verdict import Verdict
from headrace.core.errors import InputFileError, RequestError
from headrace.pages.terminal import console
from headrace.testing.checkpoints import tiny_checkpoint
from tests.unit.certificate_cases import make, open_tiny, three_prompts

Paths = dict[str, Kind]
"""Part -> what is said of it."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def certified(tiny: Path) -> dict[str, Any]:
    return make(open_tiny(tiny), three_prompts())


def run_check(found: dict[str, Any], folder: Path, model: Path, **settings: Any) -> CheckResult:
    path = folder / "certificate.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return check(str(path), lambda one: open_tiny(model, **{**engine_settings(one), **settings}), lambda text: None)


def named(result: CheckResult) -> Paths:
    return {one.part: one.kind for one in result.differences}


def sealed_again(found: dict[str, Any]) -> dict[str, Any]:
    """By somebody who wants the change not to be seen."""
    return found | {SEALED: seals(found)}


def put(found: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(found)
    at: Any = changed
    *names, last = path.split(".")
    for name in names:
        at = at[int(name) if isinstance(at, list) else name]
    at[int(last) if isinstance(at, list) else last] = value
    return changed


def leaves(value: Any, path: str = "") -> list[str]:
    """Paths of all values that hold no others."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [one for name, below in inner for one in leaves(below, f"{path}.{name}" if path else str(name))] or [path]


class TestHashes:
    def test_of_a_token_list(self) -> None:
        assert tokens_sha256((7, 2**32 - 1)) == hashlib.sha256(struct.pack("<III", 2, 7, 2**32 - 1)).hexdigest()
        assert tokens_sha256(()) == hashlib.sha256(b"\0\0\0\0").hexdigest()
        whole = struct.pack("<IIIII", 2, 1, 5, 1, 6)
        assert prompts_sha256(((5,), (6,))) == hashlib.sha256(whole).hexdigest()

    @given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4))
    def test_prompts_that_differ_have_other_hashes(self, prompts: list[list[int]]) -> None:
        assert prompts_sha256(prompts) != prompts_sha256([*prompts, []])
        if len(prompts) > 1:
            joined = [[*prompts[0], *prompts[1]], *prompts[2:]]
            assert prompts_sha256(prompts) != prompts_sha256(joined)

    def test_of_a_folder(self, tiny: Path) -> None:
        with open_tiny(tiny).checkpoint as checkpoint:
            found = hash_weights(checkpoint, lambda text: None)
            assert [one.name for one in found.files] == ["config.json", "model.safetensors"]
            for one in found.files:
                data = (tiny / one.name).read_bytes()
                assert (one.nbytes, one.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            lines = "".join(f"{one.sha256}  {one.name}\n" for one in found.files)
            assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()
            assert found.fingerprint == checkpoint.fingerprint()
            digest = hashlib.sha256((tiny / "generation_config.json").read_bytes()).hexdigest()
            assert (
                tokenizer_sha256(checkpoint)
                == hashlib.sha256(f"{digest}  generation_config.json\n".encode()).hexdigest()
            )

    def test_shards_and_their_index_are_the_weights_too(self, tiny: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny, tmp_path / "sharded")
        with open_tiny(tiny).checkpoint as checkpoint:
            homes = dict.fromkeys(checkpoint.names(), "part-1.safetensors")
        (folder / "model.safetensors").rename(folder / "part-1.safetensors")
        (folder / "unused.safetensors").write_bytes(b"")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
        with open_tiny(folder).checkpoint as checkpoint:
            names = [path.name for path in weight_paths(checkpoint)]
        assert names == ["config.json", "model.safetensors.index.json", "part-1.safetensors"]


class TestContent:
    def test_it_says_what_was_measured(self, certified: dict[str, Any], tiny: Path) -> None:
        assert certified["format"] == "headrace-certificate/1" and certified["verdict"] == "identical"
        assert certified["reference"]["name"] == "serial" and certified["method"]["name"] == "fused"
        assert certified["machine"]["threads"] == 1 and certified["machine"]["isa"]
        assert certified["prompts"] == {
            "count": 3,
            "sha256": prompts_sha256(three_prompts().prompts),
            "ids_included": True,
        }
        for one, prompt in zip(certified["results"], three_prompts().prompts, strict=True):
            assert one["prompt_sha256"] == tokens_sha256(prompt)
            assert one["sha256"] == one["reference_sha256"] == tokens_sha256(one["token_ids"])
            assert one["tokens"] == 6 and one["reference_token_ids"] is None
        assert certified["margin"]["positions"] == 18 and certified["margin"]["min"] > certified["epsilon"]["value"] > 0
        assert str(tiny) not in json.dumps(certified), "no path of the maker's machine"

    def test_margins(self) -> None:
        margins = [[0.5] * 150, [0.01, 0.0, 0.2, *[1.0] * 47]]
        found = {"positions": 200, "min": 0.0, "p01": 0.01, "tied_positions": 1, "near_tied_positions": 2}
        assert margin_summary(margins, 0.1) == found
        empty = {"positions": 0, "min": None, "p01": None, "tied_positions": 0, "near_tied_positions": 0}
        assert margin_summary([[]], 0.1) == empty

    def test_a_method_that_differs_can_be_certified_to_differ(self, tmp_path: Path) -> None:
        # Of a width whose products are quantised.
        tiny = tiny_checkpoint(tmp_path / "model", hidden_size=64, num_attention_heads=4, intermediate_size=128)
        asked = three_prompts()
        longer = replace(asked, requests=tuple(replace(one, max_tokens=20) for one in asked.requests))
        found = make(open_tiny(tiny), longer, "fused-int4")
        assert found["verdict"] != "identical" and found["method"]["config"]["quant"] == "int4"
        one = next(one for one in found["results"] if one["verdict"] != "identical")
        assert one["reference_token_ids"][: one["at"]] == one["token_ids"][: one["at"]]
        assert one["reference_token_ids"][one["at"]] != one["token_ids"][one["at"]] and one["margin"] > 0
        assert run_check(found, tmp_path, tiny).status == 0


class TestCheck:
    @pytest.mark.parametrize("threads", [1, 2])
    def test_it_holds_with_any_number_of_threads(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path, threads: int
    ) -> None:
        result = run_check(certified, tmp_path, tiny, threads=threads)
        assert named(result) == ({} if threads == 1 else {"machine.threads": Kind.SETTING})
        assert result.status == 0 and result.ran and result.same_class
        assert conclusion(result)[0].startswith("Holds: ")

    @pytest.mark.parametrize(
        ("path", "value", "part"),
        [
            ("workload.requests.1.token_ids.2", 99, "workload.requests.1.token_ids"),
            ("workload.requests.1.title", "x", "workload.requests.1"),
            ("workload.sha256", "0" * 64, "workload.sha256"),
            ("prompts.sha256", "0" * 64, "prompts.sha256"),
            ("weights.files.1.sha256", "0" * 64, "weights.files.1"),
            ("weights.sha256", "0" * 64, "weights.sha256"),
            ("tokenizer_sha256", "0" * 64, "tokenizer_sha256"),
            ("reference.config.max_num_seqs", 8, "reference.config.max_num_seqs"),
            ("method.name", "static:2", "method.name"),
        ],
    )
    def test_a_changed_part_of_the_experiment_is_named_and_it_is_not_run(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path, path: str, value: Any, part: str
    ) -> None:
        result = run_check(put(certified, path, value), tmp_path, tiny)
        assert {one.part: one.kind for one in result.broken} == {part: Kind.FILE}
        assert result.status == 1 and not result.ran
        assert conclusion(result)[0].startswith("Does not hold: what it is about")

    @pytest.mark.parametrize(
        ("path", "value", "part"),
        [
            ("results.2.sha256", "0" * 64, "results.2.sha256"),
            ("results.2.reference_sha256", "0" * 64, "results.2.reference_sha256"),
            ("results.2.token_ids.5", 3, "results.2.token_ids"),
            ("results.2.prompt_sha256", "0" * 64, "results.2.prompt_sha256"),
            ("results.2.tokens", 7, "results.2.tokens"),
            ("results.2.verdict", "near-tie", "results.2.verdict"),
            ("results.2.finish_reason", "stop", "results.2"),
            ("verdict", "different", "verdict"),
            ("created", "2027-01-01", "created"),
            ("machine.threads", 2, "machine.threads"),
            ("machine.cpu", "a faster one", "machine.cpu"),
            ("versions.headrace", "0.0.0", "versions.headrace"),
            ("margin.min", 9.5, "margin.min"),
            ("epsilon.value", 0.5, "epsilon.value"),
            ("scope", "anywhere", "scope"),
        ],
    )
    def test_another_changed_part_is_named_and_the_answers_are_still_checked(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path, path: str, value: Any, part: str
    ) -> None:
        result = run_check(put(certified, path, value), tmp_path, tiny)
        assert named(result) == {part: Kind.FILE}
        assert result.status == 1 and result.ran
        assert conclusion(result)[0].startswith("Does not hold as it is written; run again, the answers")

    @pytest.mark.parametrize("part", ["machine.cpu", "results.1", "9" * 5000])
    def test_a_changed_seal_is_noticed_like_a_changed_part(
        self, certified: dict[str, Any], tmp_path: Path, part: str
    ) -> None:
        path = tmp_path / "certificate.json"
        path.write_text(json.dumps(certified | {SEALED: certified[SEALED] | {part: "0" * 64}}), encoding="utf-8")
        assert [one.part for one in changed_parts(read_certificate(path))] == [part]

    def test_a_byte_of_the_weights(self, tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
        other = shutil.copytree(tiny, tmp_path / "other")
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (other / "model.safetensors").write_bytes(data)
        result = run_check(certified, tmp_path, other)
        assert named(result) == {"weights.files.1": Kind.MODEL} and result.status == 1 and not result.ran
        assert "'model.safetensors' has other bytes" in result.differences[0].text

    def test_other_files_of_the_model(self, tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
        other = shutil.copytree(tiny, tmp_path / "other")
        (other / "config.json").write_text((other / "config.json").read_text() + " ")
        (other / "generation_config.json").write_text("{}")
        result = run_check(certified, tmp_path, other)
        assert named(result) == {"weights.files.0": Kind.MODEL, "tokenizer_sha256": Kind.MODEL}
        assert "bytes here" in result.differences[0].text

    def test_an_answer_that_was_never_given(self, tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
        """Changed and sealed again: only running it tells."""
        forged = put(certified, "results.1.token_ids.3", 50)
        digest = tokens_sha256(forged["results"][1]["token_ids"])
        forged = put(put(forged, "results.1.sha256", digest), "results.1.reference_sha256", digest)
        result = run_check(sealed_again(forged), tmp_path, tiny)
        assert named(result) == {"results.1.sha256": Kind.ANSWER, "results.1.reference_sha256": Kind.ANSWER}
        for one in result.differences:
            assert one.verdict is not None and one.verdict.margin is not None
            assert (one.verdict.question, one.verdict.token, one.verdict.kind) == (1, 3, Verdict.DIFFERENT)
            assert "prompt 2: the answer of " in one.text and "different at token 4 (margin " in one.text
        assert result.status == 1 and conclusion(result)[0] == "Does not hold here: other answers to 1 of 3 prompts."

    @pytest.mark.parametrize("ids", [[], [2**32 - 1] * 9])
    def test_an_answer_that_this_model_cannot_give(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path, ids: list[int]
    ) -> None:
        forged = put(certified, "results.1.token_ids", ids)
        digest = tokens_sha256(ids)
        forged = put(put(forged, "results.1.sha256", digest), "results.1.reference_sha256", digest)
        result = run_check(sealed_again(put(forged, "results.1.tokens", len(ids))), tmp_path, tiny)
        assert named(result) == {"results.1.sha256": Kind.ANSWER, "results.1.reference_sha256": Kind.ANSWER}
        for one in result.differences:
            assert one.verdict is not None and one.verdict.token == 0
            assert (one.verdict.margin is None) == (not ids)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"workload.requests.1.token_ids.0": 97}, "prompt"),
            ({"workload.requests.1.max_tokens": 500, "sampling.max_tokens": 500}, "max_tokens"),
            ({"method.name": "url:http://127.0.0.1:9/v1"}, "method"),
            ({"method.name": "nonsense"}, "methods"),
        ],
    )
    def test_what_cannot_be_run_again_is_refused(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path, changes: dict[str, Any], told: str
    ) -> None:
        forged = certified
        for path, value in changes.items():
            forged = put(forged, path, value)
        prompts = [one["token_ids"] for one in forged["workload"]["requests"]]
        forged = put(forged, "prompts.sha256", prompts_sha256(prompts))
        for index, prompt in enumerate(prompts):
            forged = put(forged, f"results.{index}.prompt_sha256", tokens_sha256(prompt))
        path = tmp_path / "certificate.json"
        path.write_text(json.dumps(forged), encoding="utf-8")
        forged = put(forged, "workload.sha256", read_certificate(path).workload.sha256)
        with pytest.raises(RequestError, match=told):
            run_check(sealed_again(forged), tmp_path, tiny)

    def test_near_ties_on_another_class_of_machine_are_told_apart(
        self, tiny: Path, certified: dict[str, Any], tmp_path: Path
    ) -> None:
        forged = put(certified, "results.1.token_ids.3", 50)
        digest = tokens_sha256(forged["results"][1]["token_ids"])
        forged = put(put(forged, "results.1.sha256", digest), "results.1.reference_sha256", digest)
        forged = put(put(forged, "epsilon.value", 1000.0), "machine.cpu", "another")
        result = run_check(sealed_again(forged), tmp_path, tiny)
        assert result.status == 1 and not result.same_class
        assert {one.verdict.kind for one in result.broken if one.verdict is not None} == {Verdict.NEAR_TIE}
        assert any("which the certificate's scope allows" in one for one in conclusion(result))

    def test_another_arithmetic_is_named(self, tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
        result = run_check(certified, tmp_path, tiny, max_num_seqs=2, kv_dtype="bfloat16")
        kinds = {part: kind for part, kind in named(result).items() if part.startswith(("reference", "method"))}
        assert kinds == {
            "reference.config.kv_dtype": Kind.CONFIG,
            "reference.config.max_num_seqs": Kind.SETTING,
            "method.config.kv_dtype": Kind.CONFIG,
            "method.config.max_num_seqs": Kind.SETTING,
        }
        assert result.status == 1 and result.ran

    def test_it_is_shown(self, tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
        forged = put(put(certified, "results.0.sha256", "0" * 64), "model", "evil\nHolds\x1b[31m")
        result = run_check(forged, tmp_path, tiny, threads=2)
        stream = io.StringIO()
        show(result, console(stream))
        text = stream.getvalue()
        assert "\x1b" not in text and "\nHolds" not in text
        assert "results.0.sha256 (changed in the file): prompt 1: is not the hash of the answer's token ids" in text
        assert "machine.threads (another setting): 1 in the certificate, 2 here" in text
        assert "Does not hold as it is written" in text


class TestReading:
    def read(self, text: str | bytes, folder: Path) -> str:
        path = folder / "c.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputFileError) as caught:
            read_certificate(path)
        told = str(caught.value)
        assert told.startswith("certificate 'c.json': ") and "\n" not in told and len(told) < 400
        return told.removeprefix("certificate 'c.json': ")

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": NaN}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 10**5])
    def test_what_is_no_json_object(self, text: bytes, tmp_path: Path) -> None:
        assert self.read(text, tmp_path)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputFileError, match="certificate 'none': no such file"):
            read_certificate(tmp_path / "none")

    @given(data=st.data())
    def test_no_change_goes_unnoticed_and_none_is_a_crash(
        self, data: st.DataObject, certified: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = data.draw(st.sampled_from(leaves({name: one for name, one in certified.items() if name != SEALED})))
        numbers = st.integers(-3, 200) | st.just(10**400) | st.floats(allow_nan=False, allow_infinity=False)
        scalars = st.none() | st.booleans() | numbers | st.text(max_size=3) | st.just("0" * 64)
        value = data.draw(scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.just("a"), scalars))
        file = tmp_path_factory.getbasetemp() / "changed.json"
        changed = put(certified, path, value)
        file.write_text(json.dumps(changed), encoding="utf-8")
        try:
            found = changed_parts(read_certificate(file))
        except InputFileError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert len(found) == (json.dumps(changed) != json.dumps(certified)), path

    def test_every_field_is_needed_and_no_other_is_taken(self, certified: dict[str, Any], tmp_path: Path) -> None:
        def paths(value: Any, path: str = "") -> list[str]:
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            found = [path] if isinstance(value, dict) else []
            return found + [
                one for name, below in inner for one in paths(below, f"{path}.{name}" if path else str(name))
            ]

        for where in paths(certified):
            names = where.split(".") if where else []
            if where in ("versions", SEALED):
                continue
            fields = certified
            for name in names:
                fields = fields[int(name) if isinstance(fields, list) else name]
            for field in fields:
                changed = copy.deepcopy(certified)
                at: Any = changed
                for name in names:
                    at = at[int(name) if isinstance(at, list) else name]
                del at[field]
                told = self.read(json.dumps(changed), tmp_path)
                assert f"{field}: missing" in told or f"{field}: got None" in told, (where, told)
            told = self.read(json.dumps(put(certified, ".".join([*names, "extra"]), 1)), tmp_path)
            assert "extra" in told or "got" in told, (where, told)

    @pytest.mark.parametrize(
        ("path", "value", "told"),
        [
            ("format", "headrace-certificate/2", "format: got 'headrace-certificate/2', allowed: "),
            ("results", [], "results: got []"),
            ("results.0", 1, "results: got ["),
            ("results.0.prompt", 1, "results.0.prompt: got 1, allowed: 0"),
            ("results.0.sha256", "0", "results.0.sha256: got '0', allowed: 64 hexadecimal digits"),
            ("results.0.token_ids.1", -1, "results.0.token_ids: got ["),
            ("results.0.token_ids.1", 2**32, "results.0.token_ids: got ["),
            ("results.0.token_ids.1", True, "results.0.token_ids: got ["),
            ("results.0.margin", -1.0, "results.0.margin: got -1.0"),
            ("results.0.margin", 10**400, "results.0.margin: got 1000"),
            ("results.0.verdict", "fine", "results.0.verdict: got 'fine', allowed: identical, near-tie, different"),
            ("workload.requests.0.token_ids", [], "workload.requests.0.token_ids: got []"),
            ("workload.requests.0.max_tokens", 2**40, "workload.requests.0.max_tokens: got 1099511627776"),
            ("workload.requests.0.arrival_s", 1e300, "workload.requests.0.arrival_s: got 1e+300"),
            ("workload.requests.0.arrival_s", 5, "workload.requests.1.arrival_s: got 0.0, allowed: 5 or later"),
            ("workload.format", "other", "workload.format: got 'other', allowed: 'headrace-workload/1'"),
            ("prompts.ids_included", False, "prompts.ids_included: got False, allowed: True"),
            ("prompts.count", 4, "prompts.count: got 4, allowed: 3"),
            ("machine.threads", 0, "machine.threads: got 0, allowed: an integer from 1 to 1024"),
            ("machine.isa", "avx2", "machine.isa: got 'avx2', allowed: a list of texts"),
            ("reference.config.max_num_seqs", "4", "reference.config.max_num_seqs: got '4'"),
            ("versions.headrace", None, "versions.headrace: got None"),
            ("weights.files", [], "weights.files: got []"),
            ("sealed.format", 5, "sealed.format: got 5"),
        ],
    )
    def test_values(self, certified: dict[str, Any], tmp_path: Path, path: str, value: Any, told: str) -> None:
        assert self.read(json.dumps(put(certified, path, value)), tmp_path).startswith(told)

    def test_a_result_for_each_prompt(self, certified: dict[str, Any], tmp_path: Path) -> None:
        fewer = put(certified, "results", certified["results"][:2])
        assert self.read(json.dumps(fewer), tmp_path) == "results: got 2, allowed: 3 entries, one a prompt"

    def test_a_file_that_is_far_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("headrace.compare.certificate_reader.MAX_BYTES", 1000)
        assert self.read(" " * 1001, tmp_path) == "1001 bytes, allowed: up to 1000"


@given(st.data())
def test_any_change_of_any_part_is_noticed(data: st.DataObject) -> None:
    """The seals cover the whole file."""
    leaf = st.integers(0, 3) | st.text(max_size=2) | st.none()
    inner = st.dictionaries(st.sampled_from("ab"), leaf, max_size=2)
    value = st.dictionaries(st.sampled_from("xyz"), leaf | inner | st.lists(inner, max_size=2), max_size=3)
    one, other = data.draw(value), data.draw(value)
    assert (seals(one) == seals(other)) == (one == other)
