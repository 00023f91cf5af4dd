"""A batch from file to file, on the real engine over a backend that is computed by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.batch.journal import Journal
from headrace.batch.lines import scan
from headrace.batch.outputs import Paths
from headrace.batch.run import Report, run_batch
from headrace.core.errors import (
    BatchChanged,
    BatchInUse,
    ConfigError,
    EngineError,
    InputFileError,
    StorageError,
)
from headrace.core.types import Event, Request, TokenEvent
from headrace.engine.client import InProcessClient
from tests.unit.batch_cases import call, fake_model, read_jsonl, tiny_model, write_adapter, write_lines
from tests.unit.test_batch_lines import BAD


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def lines(count: int = 30) -> list[dict[str, Any]]:
    """Greedy ones, with a bad one now and then; some have several prompts, some chats."""
    found = []
    for k in range(count):
        body: dict[str, Any] = {"max_tokens": 1 + k % 7, "prompt": ["abc" * k or "x", "y"] if k % 5 == 0 else f"p{k}"}
        url = "/v1/completions"
        if k % 4 == 3:
            url, body = "/v1/chat/completions", {"max_tokens": 5, "messages": [{"role": "user", "content": f"m{k}"}]}
        if k % 11 == 6:
            body["colour"] = 1
        found.append(call(f"r{k}", url, **body))
    return found


class Batch:
    """One input, and runs of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.source = write_lines(folder / "in.jsonl", lines())
        self.paths = Paths.beside(folder / "out.jsonl")

    def run(self, stop: Callable[[], bool] = lambda: False, **settings: Any) -> Report:
        return run_batch(fake_model(self.model, **settings), scan(self.source), self.paths.out, stop)

    def run_some(self, new: int, **settings: Any) -> Report:
        """A run that is told to stop once it has so many new outcomes."""
        reports: list[Report] = []

        def stop() -> bool:
            return bool(reports) and reports[-1].done - reports[-1].done_before >= new

        opened = fake_model(self.model, **settings)
        return run_batch(opened, scan(self.source), self.paths.out, stop, reports.append)

    def files(self) -> tuple[bytes, bytes | None]:
        errors = self.paths.errors
        return self.paths.out.read_bytes(), errors.read_bytes() if errors.exists() else None

    def left(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def batch(tmp_path: Path, model: Path) -> Batch:
    return Batch(tmp_path, model)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[bytes, bytes | None]:
    """The files of a run that nothing disturbed; the input was last changed at second 1000."""
    batch = Batch(tmp_path_factory.mktemp("undisturbed"), model)
    os.utime(batch.source, (1000, 1000))
    batch.run()
    return batch.files()


def test_every_line_once_and_in_order(batch: Batch) -> None:
    report = batch.run()
    answers, failed = read_jsonl(batch.paths.out), read_jsonl(batch.paths.errors)
    expected = [line["custom_id"] for line in lines()]
    assert [one["custom_id"] for one in answers] == [name for k, name in enumerate(expected) if k % 11 != 6]
    assert [one["custom_id"] for one in failed] == [name for k, name in enumerate(expected) if k % 11 == 6]
    assert (report.ok, report.failed, report.num_lines, report.again) == (len(answers), len(failed), 30, 0)
    assert batch.left() == {"in.jsonl", "out.jsonl", "out.errors.jsonl"}
    for one in answers:
        assert list(one) == ["id", "custom_id", "response", "error"] and one["error"] is None
        assert one["response"]["status_code"] == 200 and one["response"]["request_id"].startswith("req_")
    for one in failed:
        assert one["response"]["status_code"] == 400 and one["error"] is None
        assert one["response"]["body"]["error"]["param"] == "colour"
    assert len({one["id"] for one in answers + failed}) == 30
    assert report.output_tokens == sum(one["response"]["body"]["usage"]["completion_tokens"] for one in answers)


def test_two_runs_give_the_same_bytes(batch: Batch, undisturbed: tuple[bytes, bytes | None]) -> None:
    os.utime(batch.source, (1000, 1000))
    batch.run(max_num_seqs=2, max_num_batched_tokens=4, block_size=4)
    assert batch.files() == undisturbed


def test_a_template_that_writes_the_date_writes_the_inputs(batch: Batch, tmp_path: Path) -> None:
    """A run that goes on after midnight gives the bytes of one that did not."""
    copy = tmp_path / "copy" / "tiny"
    shutil.copytree(batch.model, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%Y-%m-%d %H:%M') }}" + settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    batch.model = copy
    body = {"messages": [{"role": "user", "content": "m"}], "max_tokens": 1, "return_token_ids": True}
    write_lines(batch.source, [call("r", "/v1/chat/completions", **body)])
    os.utime(batch.source, (1_000_000_000, 1_000_000_000))
    batch.run()
    (answer,) = read_jsonl(batch.paths.out)
    prompt = fake_model(copy).tokenizer.decode(answer["response"]["body"]["prompt_token_ids"])
    assert prompt.startswith("2001-09-09 01:46")


def test_an_interrupted_run_goes_on(batch: Batch, undisturbed: tuple[bytes, bytes | None]) -> None:
    """Told to stop after every few steps; each time the same command again."""
    os.utime(batch.source, (1000, 1000))
    runs = 0
    while True:
        report = batch.run_some(4, max_num_seqs=2)
        runs += 1
        assert report.interrupted == batch.paths.journal.exists()
        if not report.interrupted:
            break
        os.utime(batch.source, (5000, 5000))  # `created` was fixed by the first run
        assert not batch.paths.out.exists() and not batch.paths.errors.exists()
    assert runs > 3 and 0 < report.done_before < 30
    assert report.again <= (runs - 1) * 2 * 2
    assert batch.files() == undisturbed


@settings(max_examples=25)
@given(st.data())
def test_a_damaged_journal_never_spoils_the_output(
    tmp_path_factory: pytest.TempPathFactory, model: Path, undisturbed: tuple[bytes, bytes | None], data: st.DataObject
) -> None:
    batch = Batch(tmp_path_factory.mktemp("damaged"), model)
    os.utime(batch.source, (1000, 1000))
    if batch.run_some(data.draw(st.integers(1, 29))).interrupted:
        damaged = bytearray(batch.paths.journal.read_bytes())
        places = st.integers(0, len(damaged) - 1)
        for place in data.draw(st.lists(places, max_size=4)):
            damaged[place] ^= data.draw(st.integers(1, 255))
        if data.draw(st.booleans()):
            del damaged[data.draw(places) :]
        batch.paths.journal.write_bytes(damaged)
        try:
            batch.run()
        except ConfigError as error:
            assert "is not a journal" in str(error)
            batch.paths.journal.unlink()
            batch.run()
    assert batch.files() == undisturbed


def test_twenty_kinds_of_bad_lines(batch: Batch) -> None:
    bad = [case[1] for case in BAD]
    own_ids = [{**one, "custom_id": f"bad{k}"} if _named_a(one) else one for k, one in enumerate(bad)]
    write_lines(batch.source, [call("used"), *own_ids, call("last")])
    report = batch.run()
    assert [one["custom_id"] for one in read_jsonl(batch.paths.out)] == ["used", "last"]
    failed = read_jsonl(batch.paths.errors)
    assert [(one["error"]["code"], one["error"]["line"]) for one in failed] == [
        (case[2], number) for number, case in enumerate(BAD, 2)
    ]
    assert all(one["response"] is None for one in failed)
    assert len({one["id"] for one in failed}) == len(BAD) == report.failed == 20


def _named_a(line: object) -> bool:
    return isinstance(line, dict) and line["custom_id"] == "a"


def test_requests_that_fail_later(batch: Batch) -> None:
    """Refused by the model's limits, by its name, by its template; the others are answered."""
    bodies: list[tuple[str, dict[str, Any], int, str]] = [
        ("long", {"prompt": "x" * 300}, 400, "context_length_exceeded"),
        ("empty", {"prompt": ""}, 400, "empty_prompt"),
        ("id", {"prompt": [10**6]}, 400, "invalid_parameter"),
        ("model", {"model": "gpt-9"}, 404, "model_not_found"),
        ("surrogate", {"prompt": "\ud800"}, 400, "bad_request"),
        ("one of two", {"prompt": ["a", "x" * 300]}, 400, "context_length_exceeded"),
    ]
    write_lines(
        batch.source, [call("a", model="tiny"), *(call(name, **body) for name, body, _, _ in bodies), call("z")]
    )
    batch.run()
    assert [one["custom_id"] for one in read_jsonl(batch.paths.out)] == ["a", "z"]
    found = [
        (one["custom_id"], one["response"]["status_code"], one["response"]["body"]["error"]["code"])
        for one in read_jsonl(batch.paths.errors)
    ]
    assert found == [(name, status, code) for name, _, status, code in bodies]


def test_a_run_where_every_line_fails_loads_no_weights(batch: Batch) -> None:
    write_lines(batch.source, ["{", "["])
    report = batch.run()
    assert (report.load_s, report.failed) == (0.0, 2)
    assert batch.paths.out.read_bytes() == b"" and len(read_jsonl(batch.paths.errors)) == 2
    assert batch.run().already


def test_without_failed_lines_there_is_no_error_file(batch: Batch) -> None:
    write_lines(batch.source, [call("a"), call("b")])
    batch.run()
    assert batch.left() == {"in.jsonl", "out.jsonl"}


def test_a_finished_run_is_known_again(batch: Batch) -> None:
    batch.run()
    before = batch.files()
    assert batch.run().already and batch.files() == before and not batch.paths.journal.exists()


@pytest.mark.parametrize(
    "case", ["edited", "line missing", "line twice", "line more", "cut off", "other input", "no errors", "other"]
)
def test_files_that_are_something_else_are_not_touched(batch: Batch, case: str) -> None:
    batch.run()
    out = batch.paths.out
    data = out.read_bytes()
    whole = data.splitlines(keepends=True)
    if case == "other input":
        write_lines(batch.source, [*lines(), call("new")])
    elif case == "no errors":
        batch.paths.errors.unlink()
    else:
        out.write_bytes(
            {
                "edited": data.replace(b'"id":"', b'"id":"0', 1),
                "line missing": b"".join(whole[1:]),
                "line twice": b"".join([whole[0], *whole]),
                "line more": b"".join([*whole, whole[-1]]),
                "cut off": data[:-5],
                "other": b"my notes\n",
            }[case]
        )
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="exists, and is not the finished output of this input"):
        batch.run()
    assert out.read_bytes() == before and not batch.paths.journal.exists()


def test_other_settings_do_not_know_the_output(batch: Batch) -> None:
    batch.run()
    with pytest.raises(ConfigError, match="exists, and is not"):
        batch.run(max_model_len=64)
    batch.run(max_num_seqs=3, block_size=8, prefix_cache=False)  # none of them changes an answer


@pytest.mark.parametrize("step", ["stage", "errors", "out", "folder", "journal"])
def test_a_kill_between_any_two_steps_of_the_end(
    batch: Batch, undisturbed: tuple[bytes, bytes | None], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Both files appear whole; the journal goes last; the same command finishes from any of the states between."""
    os.utime(batch.source, (1000, 1000))

    class Killed(BaseException):
        pass

    real = {"replace": Path.replace, "unlink": Path.unlink}

    def replace(path: Path, target: Path) -> Path:
        if step == "stage" or (step == "errors" and target == batch.paths.out):
            raise Killed
        moved = real["replace"](path, target)
        if step == "out" and target == batch.paths.out:
            raise Killed
        return moved  # type: ignore[return-value]

    def sync_folder(folder: Path) -> None:
        if step == "folder" and batch.paths.out.exists():
            raise Killed

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if step == "journal":
            raise Killed
        real["unlink"](path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr("headrace.batch.outputs.sync_folder", sync_folder)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            batch.run()
    assert batch.paths.journal.exists()
    report = batch.run()
    assert report.done_before == 30 or report.already
    assert report.output_tokens == 0, "nothing is computed again"
    assert batch.files() == undisturbed
    assert batch.left() == {"in.jsonl", "out.jsonl", "out.errors.jsonl"}


def test_no_room_for_the_output(
    batch: Batch, undisturbed: tuple[bytes, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(batch.source, (1000, 1000))
    real = os.fsync

    def fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == f".{batch.paths.out.name}.partial":
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr("headrace.batch.outputs.os.fsync", fsync)
        with pytest.raises(StorageError, match=r"out.jsonl: No space left on device; what is done is kept"):
            batch.run()
    assert batch.left() == {"in.jsonl", "out.jsonl.journal"}
    batch.run()
    assert batch.files() == undisturbed


def interrupted(batch: Batch) -> None:
    assert batch.run_some(7).interrupted


def test_a_changed_input_is_refused(batch: Batch) -> None:
    interrupted(batch)
    journal = batch.paths.journal.read_bytes()
    original = batch.source.read_bytes()
    batch.source.write_bytes(original.replace(b'"max_tokens": 3', b'"max_tokens": 4', 1))
    with pytest.raises(BatchChanged, match="begun with another input"):
        batch.run()
    assert batch.paths.journal.read_bytes() == journal
    batch.source.write_bytes(original)
    assert batch.run().done_before > 0


@pytest.mark.parametrize(("changed", "name"), [({"threads": 7}, "threads"), ({"max_model_len": 99}, "max_model_len")])
def test_changed_settings_are_refused(batch: Batch, changed: dict[str, Any], name: str) -> None:
    interrupted(batch)
    with pytest.raises(BatchChanged, match=f"begun with {name} "):
        batch.run(**changed)
    assert batch.run().done_before > 0


def test_a_changed_model_or_tokenizer_is_refused(batch: Batch, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "tiny"
    shutil.copytree(batch.model, copy)
    batch.model = copy
    interrupted(batch)
    settings = copy / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("<|assistant|>{% endif %}", "<|user|>{% endif %}"))
    with pytest.raises(BatchChanged, match="begun with tokenizer "):
        batch.run()
    settings.write_text(text)
    assert batch.run().done_before > 0


def test_an_adapter_is_asked_for_as_a_model(batch: Batch, tmp_path: Path) -> None:
    adapters = {"style": str(write_adapter(tmp_path / "style"))}
    write_lines(batch.source, [call("own", model="tiny"), call("adapted", model="style"), call("none", model="other")])
    batch.run(adapters=adapters)
    own, adapted = (one["response"]["body"] for one in read_jsonl(batch.paths.out))
    assert (own["model"], adapted["model"]) == ("tiny", "style")
    assert own["choices"][0]["text"] != adapted["choices"][0]["text"]
    assert [one["custom_id"] for one in read_jsonl(batch.paths.errors)] == ["none"]
    batch.paths.out.unlink()
    batch.paths.errors.unlink()
    assert batch.run_some(1, adapters=adapters, max_num_seqs=1).interrupted
    write_adapter(tmp_path / "style", value=0.25)
    with pytest.raises(BatchChanged, match="begun with adapters "):
        batch.run(adapters=adapters)
    with pytest.raises(ConfigError, match="adapter: 'tiny' is the model's own name"):
        batch.run(adapters={"tiny": adapters["style"]})


def test_an_answer_belongs_to_its_line(batch: Batch) -> None:
    """A journal whose records are of other lines of the same file: they are not used."""
    interrupted(batch)
    with Journal.open(batch.paths.journal, _manifest(batch.paths.journal.read_bytes()), 30) as journal:
        journal.finish(0, b"x" * 16, '{"id":"forged"}', True, 0, 0)
    batch.run()
    assert b"forged" not in batch.files()[0]
    assert len(read_jsonl(batch.paths.out)) + len(read_jsonl(batch.paths.errors)) == 30


def _manifest(journal: bytes) -> dict[str, Any]:
    start = journal.index(b'M{"') + 1
    value, _ = json.JSONDecoder().raw_decode(journal[start:].decode("latin-1"))
    assert isinstance(value, dict)
    return value


def test_two_at_once(batch: Batch) -> None:
    seen: list[str] = []

    def stop() -> bool:
        if not seen:
            seen.append("asked")
            with pytest.raises(BatchInUse, match="another process is running this batch"):
                batch.run()
        return False

    batch.run(stop)
    assert seen and len(read_jsonl(batch.paths.out)) == 27


def test_a_dead_engine_fails_no_line(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    polls: Iterator[int] = iter(range(10))
    with monkeypatch.context() as patch:
        patch.setattr(InProcessClient, "health", lambda self: None if next(polls, None) is not None else "lost it")
        with pytest.raises(EngineError, match=r"the engine has ended: lost it; what is done is kept"):
            batch.run()
    report = batch.run()
    assert report.done_before > 0 and report.failed == 3


def test_lines_in_flight_are_bounded(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are not in flight stay in the file, however many there are."""
    write_lines(batch.source, [call(f"r{k}", prompt=["a", "b"], max_tokens=1 + k % 3) for k in range(400)])
    submitted = ended = most = 0
    real_submit, real_poll = InProcessClient.submit, InProcessClient.poll

    def submit(self: InProcessClient, request: Request) -> None:
        nonlocal submitted, most
        submitted += 1
        most = max(most, submitted - ended)
        real_submit(self, request)

    def poll(self: InProcessClient) -> list[Event]:
        nonlocal ended
        events = real_poll(self)
        ended += sum(not isinstance(event, TokenEvent) for event in events)
        return events

    monkeypatch.setattr(InProcessClient, "submit", submit)
    monkeypatch.setattr(InProcessClient, "poll", poll)
    batch.run(max_num_seqs=4)
    assert submitted == ended == 800 and most <= 2 * 4 + 1  # a line's requests come together


def test_outputs_that_cannot_be(batch: Batch, tmp_path: Path) -> None:
    opened = fake_model(batch.model)
    source = scan(batch.source)
    for out, words in (
        (batch.source, "is also the output"),
        (tmp_path, "not a regular file"),
        (Path(os.devnull), "not a regular file"),
        (tmp_path / "none" / "out.jsonl", "its folder is missing"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_batch(opened, source, out)
    assert batch.left() == {"in.jsonl"}


def test_an_input_changed_during_the_run_is_noticed(batch: Batch) -> None:
    changed: list[int] = []

    def stop() -> bool:
        if not changed:
            changed.append(1)
            data = batch.source.read_bytes()
            batch.source.write_bytes(data[:-20] + b" " * 19 + b"\n")
        return False

    with pytest.raises(InputFileError, match="changed while it was read"):
        batch.run(stop)
    assert not batch.paths.out.exists()


def test_lines_that_draw_get_a_seed_of_their_own() -> None:
    from headrace.batch.identity import line_seed
    from headrace.batch.lines import RawLine

    one, same, other = (RawLine(k, k, b"", digest) for k, digest in enumerate([b"a" * 16, b"a" * 16, b"b" * 16]))
    assert line_seed(one) == line_seed(same) != line_seed(other)
    assert -(2**63) <= line_seed(one) < 2**63
