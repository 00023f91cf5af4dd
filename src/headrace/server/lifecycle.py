"""A server from its first line to its last: start the engine, listen, drain, end."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn
import uvloop

from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError
from headrace.engine.energy import find_meters
from headrace.engine.identity import identify_model
from headrace.engine.model import OpenModel
from headrace.engine.supervisor import Supervisor
from headrace.server.app import build_app
from headrace.server.config import ServeConfig
from headrace.server.energy import Energy
from headrace.server.metrics import ServerMetrics
from headrace.server.protocol import make_protocol
from headrace.server.service import Service
from headrace.server.traces import Traces

STEP_S = 0.1
"""How long a step may take while a client waits for a token or leaves: prompts are computed in pieces of this size."""
BACKLOG = 2048
COLLECT_EVERY = 5000
"""New objects between two searches for garbage: a request leaves some, and a search among so few takes half a
millisecond."""
MAX_FILES = 65_536
"""A connection is a file, and the usual limit of 1,024 is less than the connections that are allowed."""
LAST_WORDS_S = 2
"""Seconds for the last answers to leave after their requests have ended."""


class Server:
    """One model behind one port. `run` returns when a signal has ended it."""

    def __init__(self, config: EngineConfig, settings: ServeConfig) -> None:
        self._config = config
        self._settings = settings
        self._phases: dict[str, float] = {}
        self._began = time.monotonic()

    async def run(self) -> None:
        """Raises ModelError, ConfigError or EngineError if it cannot start."""
        traces = Traces(self._settings.otlp_endpoint) if self._settings.otlp_endpoint else None
        listener = self._listen()
        with self._phase("model opened"):
            opened = OpenModel(self._config)
        self._print_choices(opened)
        supervisor = Supervisor(self._engine_config(opened), opened.eos_token_ids, STEP_S)
        try:
            with self._phase("engine loaded"):
                loading = asyncio.create_task(supervisor.start())
                await asyncio.sleep(0)  # the process is on its way before this one goes on
                self._warm(opened)
                loaded = await loading
            self._phases |= {f"  {name}": seconds for name, seconds in loaded.seconds.items()}
            identity = identify_model(opened)
            name = (*self._settings.served_model_name, *identity.served)[0]
            service = Service(opened, self._settings, supervisor, self._metrics(opened, name), identity, traces)
            await self._serve(service, listener)
        finally:
            listener.close()
            await supervisor.close()
            opened.close()

    def _warm(self, opened: OpenModel) -> None:
        """What this process has to do meanwhile."""
        if opened.has_text:
            with self._phase("  tokenizer"):
                opened.tokenizer.start()

    def _engine_config(self, opened: OpenModel) -> EngineConfig:
        """The engine's process measures the machine again, a moment later: what was said here is to hold."""
        found = opened.config
        return replace(
            self._config,
            device=found.device,
            max_model_len=found.max_model_len,
            max_num_seqs=found.max_num_seqs,
            max_num_batched_tokens=found.max_num_batched_tokens,
            threads=found.threads,
        )

    def _metrics(self, opened: OpenModel, name: str) -> ServerMetrics:
        settings, config = self._settings, opened.config
        return ServerMetrics(
            name,
            config.max_model_len,
            settings.metrics_as,
            {"block_size": str(config.block_size), "num_gpu_blocks": str(config.num_blocks)},
            Energy(find_meters(cuda=config.device == "cuda"), settings.price_per_kwh),
        )

    def _listen(self) -> socket.socket:
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            listener.close()
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{settings.host}:{settings.port}: cannot be listened on: {reason}") from None
        return listener

    async def _serve(self, service: Service, listener: socket.socket) -> None:
        config = uvicorn.Config(
            build_app(service),
            loop="none",
            http=make_protocol(self._settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        server = _Uvicorn(config)
        sampling = asyncio.create_task(service.sample(), name="metrics")
        with self._signals(service, server):
            await server.serve([listener], self._on_listening(service, listener))
        sampling.cancel()
        await service.close()

    def _on_listening(self, service: Service, listener: socket.socket) -> Callable[[], None]:
        def tell() -> None:
            # What is here now stays: no search for garbage, which stops every stream, need look at it again.
            gc.collect()
            gc.freeze()
            gc.set_threshold(COLLECT_EVERY)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            for name, seconds in self._phases.items():
                say(f"{name:>16}  {seconds:.2f} s")
            say(f"ready in {time.monotonic() - self._began:.2f} s; model {service.served[0]}")
            # The one line on stdout: what starts a server waits for it, and reads the port.
            print(f"listening on http://{shown}:{port}", flush=True)

        return tell

    @contextmanager
    def _signals(self, service: Service, server: _Uvicorn) -> Iterator[None]:
        """SIGTERM and SIGINT: the first drains, the second ends."""
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []

        async def drain() -> None:
            await service.drain()
            server.should_exit = True

        def caught() -> None:
            if not tasks:
                say(f"shutting down; running requests have {self._settings.drain:g} s (again: at once)")
                tasks.append(asyncio.create_task(drain(), name="drain"))
            else:
                service.end()
                server.should_exit = True

        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, caught)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._phases[name] = time.monotonic() - began

    def _print_choices(self, opened: OpenModel) -> None:
        config = opened.config
        for name in config.__dataclass_fields__:
            if name != "reasons":
                value = str(getattr(config, name))
                reason = config.reasons.get(name, "").removeprefix(f"{value}: ")
                say(f"{name:>24}  {value}" + (f"  ({reason})" if reason else ""))


class _Uvicorn(uvicorn.Server):
    """uvicorn with the signals left to us, and a call when it listens."""

    async def serve(  # type: ignore[override]
        self, sockets: list[socket.socket], on_listening: Callable[[], None]
    ) -> None:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets=sockets)
        on_listening()
        await self.main_loop()
        await self.shutdown(sockets=sockets)


def serve(config: EngineConfig, settings: ServeConfig) -> None:
    """Runs a server until a signal ends it. Raises ModelError, ConfigError, EngineError."""

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_FILES)), hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Server(config, settings).run())


def say(line: str) -> None:
    """What a person reads."""
    print(line, file=sys.stderr, flush=True)
