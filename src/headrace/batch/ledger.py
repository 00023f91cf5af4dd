"""The books of one run: which lines have their outcome, what is still to be done, and what the run was like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.api.errors import cut, error_body
from headrace.api.json import dump
from headrace.batch.identity import Identity
from headrace.batch.journal import Journal
from headrace.batch.lines import BatchLine, InputFile, RawLine, line_error, read_lines
from headrace.batch.outputs import Paths, is_finished, write_outputs
from headrace.core.errors import ConfigError, HeadraceError


@dataclass(slots=True)
class Report:
    """What one run of the command did."""

    num_lines: int
    done_before: int = 0
    """Lines that earlier runs had finished."""
    ok: int = 0
    failed: int = 0
    """Of all the lines, these and those before."""
    again: int = 0
    """Lines begun more than once, over all the runs."""
    cut_bytes: int = 0
    """Bytes of the journal that were not whole."""
    started_over: bool = False
    """Whether not even the journal's first record was whole."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Of this run."""
    load_s: float = 0.0
    run_s: float = 0.0
    already: bool = False
    """The files were there."""
    interrupted: bool = False
    retries: int | None = None
    """How often this run sent a line again; None where there was no server to send it to."""
    systems: tuple[str, ...] = ()
    """The `system_fingerprint`s of a server's answers, where they had one; of all the runs."""

    @property
    def done(self) -> int:
        return self.ok + self.failed


OnProgress = Callable[[Report], None]


class Ledger:
    """Every outcome of a line goes through here into the journal."""

    def __init__(self, source: InputFile, identity: Identity, journal: Journal, on_progress: OnProgress) -> None:
        self.identity = identity
        self.journal = journal
        found = journal.found
        self.report = Report(source.num_lines, cut_bytes=found.cut_bytes)
        self.report.started_over = found.fresh and found.cut_bytes > 0
        self._on_progress = on_progress

    def has(self, line: RawLine) -> bool:
        """Whether an earlier run has finished the line, which is then counted. Raises StorageError."""
        outcome = self.journal.outcome(line.index)
        if outcome is None or outcome.digest != line.digest:
            return False
        self.report.done_before += 1
        self._count(outcome.ok)
        return True

    def refuse(self, line: RawLine, read: BatchLine, error: HeadraceError) -> None:
        """The line is not carried out. Raises StorageError."""
        if read.is_call:
            self.keep(line, read.custom_id, error.status, dump(error_body(error)))
        else:
            self._keep_error(line, read.custom_id, line_error(read, line.number))

    def fail(self, line: RawLine, custom_id: str | None, code: str, message: str) -> None:
        """The line was sent, and nothing came back that could be its answer. Raises StorageError."""
        said = cut(" ".join(message.split()), 1000)
        self._keep_error(line, custom_id, {"code": code, "message": said, "param": None, "line": line.number})

    def keep(
        self,
        line: RawLine,
        custom_id: str | None,
        status: int,
        body: str,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        """The answer that a server gave, or would have given; `body`: its JSON, of one line, in ASCII. Raises
        StorageError."""
        identity = self.identity
        text = (
            f'{{"id":{dump(identity.line_id(line))},"custom_id":{dump(custom_id)},"response":{{"status_code":{status},'
            f'"request_id":{dump(identity.request_id(line))},"body":{body}}},"error":null}}'
        )
        self._log(line, text, status == 200, prompt_tokens, output_tokens)

    def _keep_error(self, line: RawLine, custom_id: str | None, error: dict[str, Any]) -> None:
        record = {"id": self.identity.line_id(line), "custom_id": custom_id, "response": None, "error": error}
        self._log(line, dump(record), ok=False)

    def _log(self, line: RawLine, text: str, ok: bool, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        self.journal.finish(line.index, line.digest, text, ok, prompt_tokens, output_tokens)
        self.journal.sync()
        self.report.prompt_tokens += prompt_tokens
        self.report.output_tokens += output_tokens
        self._count(ok)

    def _count(self, ok: bool) -> None:
        self.report.ok += ok
        self.report.failed += not ok
        self._on_progress(self.report)


def output_paths(source: InputFile, out: Path) -> Paths:
    """Where the outcome goes. Raises ConfigError."""
    paths = Paths.beside(out)
    if paths.out.exists() and paths.out.samefile(source.path):
        raise ConfigError(f"{source.path}: is also the output, allowed: another file")
    return paths


def run_durably(
    source: InputFile,
    paths: Paths,
    identity: Identity,
    answer_all: Callable[[Ledger], bool],
    on_progress: OnProgress,
) -> Report:
    """Goes on where an earlier run of the same identity ended; writes the files once `answer_all` says that every line
    has its outcome.

    Raises InputFileError (the file was changed since its scan), ConfigError (the output is in use, was begun with
    something else, or exists), StorageError (nothing is lost), and what `answer_all` raises.
    """
    if not paths.journal.exists() and _is_there(paths, source, identity):
        return Report(source.num_lines, already=True)
    with Journal.open(paths.journal, identity.manifest(source), source.num_lines) as journal:
        try:
            there = _is_there(paths, source, identity, resumed=not journal.found.fresh)
        except ConfigError:
            if journal.found.fresh:
                journal.remove()
            raise
        if there:
            journal.remove()
            return Report(source.num_lines, already=True)
        ledger = Ledger(source, identity, journal, on_progress)
        if answer_all(ledger):
            write_outputs(journal, paths)
        return ledger.report


def _is_there(paths: Paths, source: InputFile, identity: Identity, resumed: bool = False) -> bool:
    """Whether the files are those of this run, finished. Raises ConfigError if they are something else.

    A run that was killed between its two files has left the error file alone, and its journal.
    """
    present = [path for path in (paths.out, paths.errors) if path.exists()]
    if not present or (resumed and present == [paths.errors]):
        return False
    if paths.out.exists() and is_finished(paths, (identity.line_id(line) for line in read_lines(source))):
        return True
    raise ConfigError(
        f"{present[0]}: exists, and is not the finished output of this input with these settings: move it away, or "
        "name another output"
    )
