"""Serve a model over the OpenAI and TGI HTTP APIs, with a web page at /. SIGTERM lets running requests finish; a second
one ends them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib.util import find_spec

from headrace.cli.console import import_numpy
from headrace.cli.flags import add_engine_flags, add_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import BackendUnavailable
from headrace.server.config import ServeConfig

KEY_VARIABLE = "HEADRACE_API_KEY"
COLLECTOR_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
NEEDS = ("fastapi", "uvicorn", "uvloop", "httptools", "msgspec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    add_flags(parser, "server", ServeConfig)


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"serve needs {', '.join(missing)}: pip install 'headrace[serve]'")
    fields = given(arguments, ServeConfig)
    if key := os.environ.get(KEY_VARIABLE):
        fields["api_key"] = (*fields.get("api_key", ()), key)
    if endpoint := os.environ.get(COLLECTOR_VARIABLE):
        fields.setdefault("otlp_endpoint", endpoint)
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    settings = ServeConfig(**fields)
    config = EngineConfig(**given(arguments, EngineConfig))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    import_numpy(os.environ)
    from headrace.server.lifecycle import serve

    serve(config, settings)
    return 0
