"""What this machine does: products, memory, disk, overheads; measured in a minute, and kept for the other plans."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.plan.document import Document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--profile",
        metavar="FILE",
        help="Where to write the profile (JSON). Default: probe.json in headrace's state folder, where the other plans "
        "look for it.",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="Threads to measure with. Default: as many as an engine takes, one per CPU that this process may use.",
    )
    group.add_argument(
        "--folder",
        metavar="FOLDER",
        help="Folder whose disk is read, through a file of 96 MiB that is deleted again. Default: the profile's.",
    )


def document(arguments: argparse.Namespace) -> Document:
    """Measures, writes the profile. Raises InvalidParameter, ConfigError."""
    from dataclasses import replace

    from headrace.cli.console import load_line_shown
    from headrace.plan.probe import run_probe
    from headrace.plan.probe_document import describe
    from headrace.plan.profile import check_writable, write_profile

    path = profile_path(arguments.profile)
    # Before the minute is spent.
    check_writable(path)
    folder = Path(arguments.folder) if arguments.folder is not None else path.parent
    if arguments.folder is not None and not folder.is_dir():
        raise ConfigError(f"folder {folder}: is no folder")
    shown = load_line_shown(os.environ)

    def tell(text: str) -> None:
        if shown:
            print(f"\r\x1b[2Kprobing this machine: {text} …", end="", file=sys.stderr, flush=True)

    try:
        profile = replace(run_probe(arguments.threads, folder, on_progress=tell), path=str(path))
    finally:
        if shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    write_profile(profile, path)
    return describe(profile)


def profile_path(given: str | None) -> Path:
    """Raises ConfigError where there is no folder to write to."""
    from headrace.cli.console import state_folder
    from headrace.plan.profile import default_path

    if given is not None:
        return Path(given)
    folder = state_folder(os.environ)
    if folder is None:
        raise ConfigError("no home folder to keep a profile in: name --profile FILE")
    return default_path(folder)
