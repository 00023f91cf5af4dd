"""A batch against a server that can fail in chosen ways."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.batch import endpoint, remote
from headrace.batch.endpoint import Server
from headrace.batch.journal import Journal
from headrace.batch.ledger import Report
from headrace.batch.lines import scan
from headrace.batch.remote import ATTEMPTS, find_model, identify_server, run_remote
from headrace.core.errors import BackendUnavailable, BatchChanged, BatchInUse, ConfigError, InvalidParameter
from tests.unit.batch_cases import call, read_jsonl, write_lines
from tests.unit.batch_server import Batch, Plan, serving
from tests.unit.test_batch_lines import BAD


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.04)


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    plan = Plan()
    with serving(plan) as url:
        yield Batch(tmp_path, plan, url)


def test_every_line_once_and_in_order(batch: Batch) -> None:
    chat = call("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], colour="blue", timeout=3)
    write_lines(batch.source, [*(call(f"r{k}", prompt=f"p{k}") for k in range(200)), chat])
    report = batch.run(concurrency=16)
    found = read_jsonl(batch.paths.out)
    assert [one["custom_id"] for one in found] == [*(f"r{k}" for k in range(200)), "chat"]
    assert [one["response"]["body"]["choices"][0]["text"] for one in found[:200]] == [f"to p{k}" for k in range(200)]
    assert all(list(one) == ["id", "custom_id", "response", "error"] and one["error"] is None for one in found)
    assert all(one["response"]["status_code"] == 200 for one in found)
    assert len({one["id"] for one in found}) == len({one["response"]["request_id"] for one in found}) == 201
    assert batch.left() == {"in.jsonl", "out.jsonl"}
    assert (report.ok, report.failed, report.again, report.retries) == (201, 0, 0, 0)
    assert (report.prompt_tokens, report.output_tokens, report.systems) == (402, 603, ("fp_one",))
    assert set(batch.plan.seen.values()) == {1}
    assert 1 < batch.plan.most_at_once <= 16
    assert batch.plan.connections <= 16 + 1, "connections are kept"
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} == set(batch.plan.paths)
    assert chat["body"] in batch.plan.bodies, "a body is sent as it stands"


def test_a_body_is_the_servers(batch: Batch) -> None:
    batch.lines("odd", "chunked", "closes", "p")
    batch.run()
    answers = batch.answers()
    assert answers["r0"] == {"text": "\u2028\ud800\x00é", "big": 10**400, "usage": {"prompt_tokens": -1}}
    assert [answers[f"r{k}"]["choices"][0]["text"] for k in (1, 2, 3)] == ["to chunked", "to closes", "to p"]
    assert batch.paths.out.read_bytes().isascii()


@pytest.mark.parametrize(
    "how", ["once-429 Retry-After=0", "once-500", "once-503", "once-408", "once-reset", "once-cut", "once-half"]
)
def test_what_passes_is_tried_again(batch: Batch, how: str) -> None:
    batch.lines("p0", how, "p2")
    report = batch.run()
    assert (report.ok, report.failed, report.retries, report.again) == (3, 0, 1, 0)
    assert batch.plan.seen[how] == 2 and list(batch.answers()) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("how", ["once-chunk", "once-reset"])
def test_on_a_connection_that_was_used_before(batch: Batch, how: str) -> None:
    batch.lines("p0", "p1", how, "p3")
    report = batch.run(concurrency=1)
    assert (report.ok, report.retries) == (4, 1)


def test_retry_after_is_waited_for(batch: Batch) -> None:
    batch.lines("once-429 Retry-After=1", "p1")
    batch.run()
    first, second = batch.plan.times["once-429 Retry-After=1"]
    assert 1.0 <= second - first < 5.0
    assert batch.plan.times["p1"][0] < second, "the others go on"


@pytest.mark.parametrize(
    ("how", "status"),
    [("500", 500), ("501", 501), ("599", 599), ("503", 503), ("429 Retry-After=0", 429), ("408", 408)],
)
def test_what_stays_is_the_lines_outcome(batch: Batch, how: str, status: int) -> None:
    batch.lines("p0", how)
    report = batch.run()
    assert (report.ok, report.failed, report.retries) == (1, 1, ATTEMPTS - 1)
    assert batch.plan.seen[how] == ATTEMPTS
    error = batch.errors()["r1"]
    assert error["response"]["status_code"] == status and error["error"] is None
    assert error["response"]["body"]["error"]["code"] == "planned"
    assert batch.run().already


@pytest.mark.parametrize(
    "how", ["400", "401", "403", "404", "409", "413", "422", "301", "204", "500 x-should-retry=false"]
)
def test_the_rest_is_an_outcome_at_once(batch: Batch, how: str) -> None:
    batch.lines(how, "p")
    report = batch.run()
    assert (report.ok, report.failed, report.retries) == (1, 1, 0)
    assert batch.errors()["r0"]["response"]["status_code"] == int(how.split()[0])


@pytest.mark.parametrize(
    ("how", "code", "words", "attempts"),
    [
        ("reset", "backend_unavailable", "without response (8 attempts)", ATTEMPTS),
        ("cut", "backend_unavailable", "the connection ended inside the answer (8 attempts)", ATTEMPTS),
        ("chunk", "backend_unavailable", "the connection ended inside the answer", ATTEMPTS),
        ("half", "invalid_json", "the answer is not JSON", ATTEMPTS),
        ("deep", "invalid_json", "nested too deeply", ATTEMPTS),
        ("endless", "body_too_large", "the answer is larger than 1000000 bytes", 1),
    ],
)
def test_what_is_no_answer_is_an_error_of_its_line(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, how: str, code: str, words: str, attempts: int
) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1_000_000)
    batch.lines("p0", how, "p2")
    report = batch.run(concurrency=2)
    assert (report.ok, report.failed) == (2, 1) and batch.plan.seen[how] == attempts
    error = batch.errors()["r1"]
    assert error["response"] is None and error["error"]["code"] == code and error["error"]["line"] == 2
    assert words in error["error"]["message"]
    assert batch.run().already


def test_an_error_that_is_no_json_is_said_in_short(batch: Batch) -> None:
    batch.lines("page")
    batch.run()
    response = batch.errors()["r0"]["response"]
    assert response["status_code"] == 404 and response["body"]["error"]["message"] == "<html>no such page</html>"


@pytest.mark.parametrize("how", ["stuck", "drip", "drip-on"])
def test_a_deadline(batch: Batch, how: str) -> None:
    batch.lines("p0", how, "p2")
    began_s = time.monotonic()
    report = batch.run(timeout_s=0.3)
    assert time.monotonic() - began_s < 8
    assert (report.ok, report.failed, batch.plan.seen[how]) == (2, 1, 1)
    assert batch.errors()["r1"]["error"]["code"] == "deadline_exceeded"
    until_no_thread_waits()


def test_lines_that_are_no_call_are_not_sent(batch: Batch) -> None:
    bad = [line if isinstance(line, str) else json.dumps(line) for _, line, _, _ in BAD]
    own_ids = [text.replace('"custom_id": "a"', f'"custom_id": "bad{k}"') for k, text in enumerate(bad)]
    streams = [call("s1", prompt="p", stream=True), call("s2", prompt="p", stream="yes"), call("s3", prompt="p")]
    streams[2]["body"]["stream"] = False
    write_lines(batch.source, [call("used", prompt="p"), *own_ids, *streams])
    batch.run()
    assert list(batch.answers()) == ["used", "s3"] and batch.plan.seen == {"p": 2}
    failed = read_jsonl(batch.paths.errors)
    assert [(one["error"]["code"], one["error"]["line"]) for one in failed[:-2]] == [
        (case[2], number) for number, case in enumerate(BAD, 2)
    ]
    for one in failed[-2:]:
        assert one["response"]["status_code"] == 400
        assert one["response"]["body"]["error"]["code"] == "unsupported_parameter"
        assert one["response"]["body"]["error"]["param"] == "stream"


@pytest.mark.parametrize("status", [429, 503, 408])
def test_a_server_that_takes_few_at_once(batch: Batch, status: int) -> None:
    """No line runs out of attempts because of the others."""
    batch.plan.capacity, batch.plan.capacity_status, batch.plan.answer_s = 4, status, 0.005
    batch.lines(*(f"p{k}" for k in range(300)))
    report = batch.run(concurrency=64)
    assert (report.ok, report.failed) == (300, 0)
    assert max(batch.plan.seen.values()) < ATTEMPTS
    assert report.retries is not None and report.retries < 200, (
        "it is not asked for more than it takes, again and again"
    )


def test_an_interrupted_run_goes_on(batch: Batch) -> None:
    batch.lines(*(f"p{k}" if k % 7 else f"400 {k}" for k in range(60)))
    batch.plan.answer_s = 0.002
    kept: bytes = b""
    runs = 0
    while True:
        report = batch.run_some(8, concurrency=4)
        runs += 1
        if not report.interrupted:
            break
        assert not batch.paths.out.exists()
        journal = batch.paths.journal.read_bytes()
        assert journal.startswith(kept), "what is kept stays as it is"
        kept = journal
    assert runs > 3 and report.done_before > 0
    assert set(batch.plan.seen.values()) == {1}, "what was in flight was waited for"
    assert (report.ok, report.failed, report.again) == (51, 9, 0)
    before = batch.files()
    assert batch.run().already and batch.files() == before
    assert list(batch.answers()) == [f"r{k}" for k in range(60) if k % 7]


def test_told_to_stop_it_does_not_wait_for_ever(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "END_S", 0.3)
    batch.lines("p0", "stuck", "429 Retry-After=100", "p3")
    began_s = time.monotonic()
    report = batch.run_some(2)
    assert report.interrupted and time.monotonic() - began_s < 3
    assert (report.ok, report.failed) == (2, 0)
    assert not batch.paths.out.exists() and batch.paths.journal.exists()


PLACE = st.floats(0, 1, exclude_max=True)
"""In a file whose length depends on which answers came first."""


@settings(max_examples=15)
@given(st.integers(1, 19), st.lists(st.tuples(PLACE, st.integers(1, 255)), max_size=3), st.none() | PLACE)
def test_a_damaged_journal_never_spoils_the_output(
    tmp_path_factory: pytest.TempPathFactory, new: int, damage: list[tuple[float, int]], end: float | None
) -> None:
    plan = Plan()
    with serving(plan) as url:
        batch = Batch(tmp_path_factory.mktemp("damaged"), plan, url)
        batch.lines(*(f"p{k}" if k % 5 else f"400 {k}" for k in range(20)))
        if batch.run_some(new, concurrency=3).interrupted:
            data = bytearray(batch.paths.journal.read_bytes())
            for place, bits in damage:
                data[int(place * len(data))] ^= bits
            if end is not None:
                del data[int(end * len(data)) :]
            batch.paths.journal.write_bytes(data)
            try:
                batch.run()
            except ConfigError as error:
                assert "is not a journal" in str(error)
                batch.paths.journal.unlink()
                batch.run()
        assert list(batch.answers()) == [f"r{k}" for k in range(20) if k % 5]
        assert list(batch.errors()) == [f"r{k}" for k in range(0, 20, 5)]
        assert batch.left() == {"in.jsonl", "out.jsonl", "out.errors.jsonl"}


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    """Nothing is lost, no line fails; once it is back the same command goes on."""
    plan = Plan(answer_s=0.01)
    with serving(plan) as url:
        batch = Batch(tmp_path, plan, url)
        batch.lines(*(f"p{k}" for k in range(100)))
        assert batch.run_some(20, concurrency=4).interrupted
        server = Server(url)
        model = find_model(server)
    with pytest.raises(
        BackendUnavailable, match=r"is not there any more: .*; what is done is kept: run the same command"
    ):
        run_remote(server, model, scan(batch.source), batch.paths.out, concurrency=4)
    with pytest.raises(BackendUnavailable, match=r"cannot be reached: Connection refused; no line was sent"):
        batch.run()
    assert batch.left() == {"in.jsonl", "out.jsonl.journal"}
    with serving(plan, server.port):
        report = batch.run()
    assert (report.ok, report.failed) == (100, 0) and report.done_before >= 20
    assert report.again <= 2 * 4
    assert list(batch.answers()) == [f"r{k}" for k in range(100)]


def test_a_server_that_answers_503_to_all(batch: Batch) -> None:
    batch.lines("503", "p")
    plan = batch.plan
    server = Server(batch.url)
    plan.models_status = 503
    with pytest.raises(BackendUnavailable, match="not there any more: answers 503"):
        run_remote(server, "tiny", scan(batch.source), batch.paths.out)
    with pytest.raises(BackendUnavailable, match="cannot be reached: /v1/models answers 503"):
        find_model(server)
    assert plan.paths.count("/v1/models") == 1 + remote.FIRST_ASKS


@pytest.mark.parametrize("changed", ["url", "model", "system"])
def test_another_server_is_refused(batch: Batch, tmp_path: Path, changed: str) -> None:
    batch.lines(*(f"p{k}" for k in range(30)))
    assert batch.run_some(10, concurrency=2).interrupted
    journal = batch.paths.journal.read_bytes()
    other = Plan()
    with serving(other) as url:
        if changed == "url":
            kept, batch.url = batch.url, url
            words = f"begun with url '{kept}', now '{url}'"
        elif changed == "model":
            batch.plan.models = {"data": [{"id": "huge"}]}
            words = "begun with model 'tiny', now 'huge'"
        else:
            batch.plan.fingerprint = "fp_two"
            words = "begun with system_fingerprint 'fp_one', now 'fp_two': run it with the same server"
        with pytest.raises(BatchChanged, match=words):
            batch.run(concurrency=2)
    now = batch.paths.journal.read_bytes()
    assert now.startswith(journal) and b"fp_two" not in now
    if changed == "url":
        batch.url = kept
    batch.plan.models, batch.plan.fingerprint = Plan().models, "fp_one"
    assert batch.run().done_before >= 10
    assert len(batch.answers()) == 30


def test_several_systems_behind_one_url_are_told(batch: Batch) -> None:
    batch.lines(*(f"p{k}" for k in range(20)))

    def look(report: Report) -> None:
        if report.done == 10:
            batch.plan.fingerprint = "fp_two"

    assert batch.run(on_progress=look, concurrency=2).systems == ("fp_one", "fp_two")


def test_a_finished_run_of_another_model_is_not_taken_for_ours(batch: Batch) -> None:
    batch.lines("p")
    batch.run()
    before = batch.files()
    batch.plan.models = {"data": [{"id": "huge"}]}
    with pytest.raises(ConfigError, match="exists, and is not the finished output of this input"):
        batch.run()
    assert batch.files() == before and not batch.paths.journal.exists()


def test_an_input_that_changed_is_refused(batch: Batch) -> None:
    batch.lines(*(f"p{k}" for k in range(30)))
    assert batch.run_some(5, concurrency=2).interrupted
    batch.lines(*(f"q{k}" for k in range(30)))
    with pytest.raises(BatchChanged, match="begun with another input"):
        batch.run()


def test_two_at_once(batch: Batch) -> None:
    batch.lines("p", "q")
    tried: list[str] = []

    def stop() -> bool:
        if not tried:
            tried.append("")
            with pytest.raises(BatchInUse):
                batch.run()
        return False

    batch.run(stop)
    assert tried and batch.plan.seen == {"p": 1, "q": 1}


@pytest.mark.parametrize(
    "settings", [{"concurrency": 0}, {"concurrency": 1025}, {"concurrency": True}, {"timeout_s": 0}, {"timeout_s": 1e9}]
)
def test_settings_that_are_refused(batch: Batch, settings: dict[str, Any]) -> None:
    batch.lines("p")
    with pytest.raises(InvalidParameter):
        batch.run(**settings)
    assert batch.left() == {"in.jsonl"}


def test_waits_grow_and_are_bounded(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    batch.lines("p")
    source = scan(batch.source)
    identity = identify_server(Server(batch.url), "tiny")
    with Journal.open(batch.paths.journal, identity.manifest(source), 1) as journal:
        from headrace.batch.ledger import Ledger

        run = remote._Run(Server(batch.url), source, Ledger(source, identity, journal, print), bool, 1, 1.0)
        for attempts in range(1, ATTEMPTS):
            longest = min(30.0, 0.5 * 2 ** (attempts - 1))
            assert all(longest / 2 <= run._wait_s(attempts, None) <= longest for _ in range(50))
        for asked, least, most in ((0.0, 0.25, 0.5), (0.1, 0.1, 0.11), (60.0, 60, 66), (5000.0, 120, 132)):
            reply = endpoint.Reply(429, None, "", retry_after_s=asked)
            assert all(least <= run._wait_s(1, reply) <= most for _ in range(50))


def until_no_thread_waits() -> None:
    """The threads that wait for a server end with the run, whatever the server does."""
    until_s = time.monotonic() + 5
    while any(thread.name.startswith("headrace-") for thread in threading.enumerate()):
        assert time.monotonic() < until_s
        time.sleep(0.01)


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_threads_and_connections_end_with_the_run(batch: Batch) -> None:
    batch.lines(*(f"p{k}" for k in range(50)), "once-reset", "closes")
    before = threading.active_count()
    open_before = num_files()
    batch.run(concurrency=32)
    until_no_thread_waits()
    until_s = time.monotonic() + 5
    while num_files() > open_before or threading.active_count() > before:
        assert time.monotonic() < until_s
        time.sleep(0.01)
