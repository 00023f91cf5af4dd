"""What several questions of `headrace plan` are asked with: the model, and the profile of a probe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.errors import ConfigError, InputFileError, InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.devices import Device


def add_model(parser: argparse.ArgumentParser, examples: str, *, instead: str | None = None) -> None:
    """`examples`: of known names. `instead`: what is answered without a model; None: it has to be named."""
    words = (
        "A config.json, a folder with one, a .gguf file, demo, a Hub id (its config alone is fetched) or a known name "
        f"such as {examples}. No weights are read."
    )
    if instead is None:
        parser.add_argument("model", metavar="MODEL", help=words)
    else:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{words} {instead}".strip())


def probed(given: str | None, instead: str) -> Path:
    """The profile that was given, else that of the last probe of this machine.

    Raises ConfigError where there was none; `instead` is what to name in its place.
    """
    from headrace.cli.plan_probe import profile_path

    found = profile_path(given)
    if given is None and not found.is_file():
        raise ConfigError(f"this machine was not probed yet ({found}): run headrace plan probe, or name {instead}")
    return found


def device_named(name: str) -> Device:
    """Of the catalogue; as this machine's last probe measured it, where that found such a GPU here. A profile that
    cannot be read is no reason not to answer by the data sheet. Raises InvalidParameter for an unknown name."""
    from headrace.cli.console import state_folder
    from headrace.plan.devices import as_measured, find_device, same_device
    from headrace.plan.profile import default_path, read_profile

    device, folder = find_device(name), state_folder(os.environ)
    if folder is not None:
        with suppress(InputFileError):
            card = read_profile(default_path(folder)).card()
            if card is not None and same_device(card.name, device.name):
                return as_measured(device, card)
    return device


def refuse_beside(arguments: argparse.Namespace, asked: str, names: Iterable[str]) -> None:
    """Raises InvalidParameter for the first of `names` that was given: `asked` would not heed it. What was not given is
    None or False."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise InvalidParameter(name, value, f"to leave it out with {asked}")
