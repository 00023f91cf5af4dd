"""The journal: what it holds after any damage was written by us, whole, and is what was written last."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batch import journal as journal_module
from headrace.batch.journal import MAGIC, Journal
from headrace.core.errors import (
    BatchChanged,
    BatchInUse,
    ConfigError,
    StorageError,
)

LINES = 12
MANIFEST = {"settings": {"dtype": "float32", "threads": 2}, "input_sha256": "ab" * 32, "created": 7}
DIGESTS = [bytes([k]) * 16 for k in range(LINES)]


def text_of(index: int) -> str:
    return json.dumps({"id": f"{index:04x}", "text": "x" * index})


def begin(folder: Path, manifest: dict[str, Any] = MANIFEST) -> Journal:
    return Journal.open(folder / "out.jsonl.journal", manifest, LINES)


def write(folder: Path, indexes: list[int]) -> Path:
    with begin(folder) as journal:
        for index in indexes:
            journal.begin(index)
            journal.finish(index, DIGESTS[index], text_of(index), index % 3 != 0, index, 2 * index)
        journal.sync(at_once=True)
        return journal.path


def kept(journal: Journal) -> list[int]:
    """The lines that have an outcome, each of which is as it was written."""
    found = []
    for index in range(LINES):
        outcome = journal.outcome(index)
        if outcome is not None:
            assert outcome.line.decode() == text_of(index)
            assert outcome.digest == DIGESTS[index]
            assert (outcome.ok, outcome.prompt_tokens, outcome.output_tokens) == (index % 3 != 0, index, 2 * index)
            found.append(index)
    return found


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    write(tmp_path, [3, 1, 0])
    with begin(tmp_path, {**MANIFEST, "created": 99}) as journal:
        assert kept(journal) == [0, 1, 3]
        assert (journal.found.done, journal.found.cut_bytes, journal.found.fresh, journal.again) == (3, 0, False, 0)
        assert journal.manifest["created"] == 7
        journal.begin(5)
        journal.begin(3)
    with begin(tmp_path) as journal:
        assert journal.again == 1
        journal.begin(5)
        assert journal.again == 2


def test_the_last_outcome_of_a_line_counts(tmp_path: Path) -> None:
    write(tmp_path, [2])
    with begin(tmp_path) as journal:
        journal.finish(2, b"n" * 16, "new", True, 0, 0)
    with begin(tmp_path) as journal:
        outcome = journal.outcome(2)
        assert outcome is not None and (outcome.line, outcome.digest) == (b"new", b"n" * 16)


@given(st.data())
def test_any_damage_costs_only_what_follows_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut off anywhere, or any bytes changed: what is still there is as it was written, and can be added to."""
    folder = tmp_path_factory.mktemp("damage")
    order = data.draw(st.permutations(range(LINES)))
    path = write(folder, order)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    places = st.integers(0, len(whole) - 1)
    for place in data.draw(st.lists(places, max_size=3)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(places) :]
    path.write_bytes(damaged)
    first = next((i for i, pair in enumerate(zip(whole, damaged, strict=False)) if pair[0] != pair[1]), len(damaged))
    try:
        journal = begin(folder)
    except ConfigError:
        assert first < len(MAGIC), "only a file that does not begin like a journal is refused"
        assert path.read_bytes() == damaged, "and it is left as it is"
        return
    with journal:
        found = kept(journal)
        assert set(order[: len(found)]) == set(found)
        for index in set(range(LINES)) - set(found):
            journal.finish(index, DIGESTS[index], text_of(index), index % 3 != 0, index, 2 * index)
        assert kept(journal) == list(range(LINES))
    with begin(folder) as journal:
        assert kept(journal) == list(range(LINES))
        assert journal.found.cut_bytes == 0


def test_a_tail_that_is_not_whole_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-30:])
    with begin(tmp_path) as journal:
        assert journal.found.cut_bytes == 30 and kept(journal) == [0, 1, 2]
    assert path.read_bytes() == whole


def test_a_length_of_gigabytes_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path, [0])
    path.write_bytes(path.read_bytes() + b"\xff\xff\xff\xff" + b"\0" * 40)
    tracemalloc.start()
    with begin(tmp_path) as journal:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert journal.found.cut_bytes == 44
    assert peak < 2**24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_sha256": "cd" * 32}, "another input .*abababababab.*cdcdcdcdcdcd.*remove the journal to start over"),
        ({"settings": {"dtype": "bfloat16", "threads": 2}}, "begun with dtype 'float32', now 'bfloat16'"),
        ({"settings": {"dtype": "float32", "threads": 2, "new": 1}}, "begun with new None, now 1"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path, [0, 1])
    before = path.read_bytes()
    with pytest.raises(BatchChanged, match=words):
        begin(tmp_path, {**MANIFEST, **change})
    assert path.read_bytes() == before
    with begin(tmp_path) as journal:
        assert kept(journal) == [0, 1]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(BatchInUse, match="another process is running this batch"):
        begin(tmp_path)
    begin(tmp_path).close()


def test_a_file_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    path.write_text("my diary\n")
    with pytest.raises(ConfigError, match="is not a journal"):
        begin(tmp_path)
    assert path.read_text() == "my diary\n"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        begin(tmp_path)


def failing(real: Callable[..., int], room: int, code: int) -> Callable[[int, Any], int]:
    """os.write on a disk with so many bytes left; writes what fits."""
    left = room

    def write(fd: int, data: Any) -> int:
        nonlocal left
        if not left:
            raise OSError(code, os.strerror(code))
        done = real(fd, memoryview(data)[:left])
        left -= done
        return done

    return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = write(tmp_path, [0, 1, 2])
    draw = random.Random(code)
    for _ in range(20):
        with begin(tmp_path) as journal, monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "write", failing(os.write, draw.randint(0, 60), code))
            with pytest.raises(StorageError, match=rf"journal: {os.strerror(code)}; what is done is kept"):
                for index in range(3, LINES):
                    journal.finish(index, DIGESTS[index], text_of(index), index % 3 != 0, index, 2 * index)
            assert kept(journal)[:3] == [0, 1, 2]
        with begin(tmp_path) as journal:
            assert journal.found.cut_bytes == 0, "what was half written has been cut off at once"
            assert kept(journal)[:3] == [0, 1, 2]
    assert path.exists()


def test_no_room_for_the_first_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (0, 5, len(MAGIC), len(MAGIC) + 20):
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "write", failing(os.write, room, errno.ENOSPC))
            with pytest.raises(StorageError):
                begin(tmp_path)
        with begin(tmp_path) as journal:
            assert journal.found.fresh and kept(journal) == []
            journal.remove()


def test_outcomes_are_synced_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    synced: list[float] = []
    with begin(tmp_path) as journal:
        monkeypatch.setattr(journal_module.time, "monotonic", lambda: now_s)
        monkeypatch.setattr(journal_module.os, "fsync", lambda fd: synced.append(now_s))
        for step in range(40):
            now_s = step * 0.03
            journal.finish(step % LINES, DIGESTS[0], "{}", True, 0, 0)
            journal.sync()
        assert all(later - earlier <= 0.16 for earlier, later in itertools.pairwise(synced))
        assert 8 <= len(synced) <= 12
        journal.sync(at_once=True)
        journal.sync(at_once=True)
        assert synced.count(now_s) == 1
