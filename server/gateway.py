"""The gateway process: serves the public and the admin listener until it is told to stop, then drains."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from typing_extensions import override

from server.api.protocol import protocol_for
from server.app import build_gateway
from server.auth.tls import TLSListener
from server.errors import ConfigError, StartError
from server.obs.logging import setup_logging
from server.settings import parse_settings

if TYPE_CHECKING:
    from collections.abc import Generator

    from starlette.types import ASGIApp

    from server.settings import ListenerSettings, Settings

log = logging.getLogger("strongroom.gateway")

KEEP_ALIVE_S = 75
EXIT_REFUSED = 78
"""`EX_CONFIG` of sysexits.h: the configuration is at fault, starting again won't help."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: two listeners share one process and one stop."""

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(listener: ListenerSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The port is taken or may not be used.
    """
    family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((listener.host, listener.port))
    except OSError as err:
        sock.close()
        raise ConfigError(
            f"The address {listener.host}:{listener.port} can't be used: {err.strerror}. Choose another port."
        ) from err
    return sock


def _server(app: ASGIApp, listener: ListenerSettings) -> _Server:
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol_for(listener),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
        limit_concurrency=listener.max_connections,
        backlog=2048,
    )
    if listener.tls is not None:
        tls = listener.tls
        reloading = TLSListener(
            tls.certificate, tls.key, client_ca=tls.client_ca, require_client=tls.require_client_certificate
        )
        reloading.start()  # its thread ends with the process
        config.load()
        config.ssl = reloading.context
    return _Server(config)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new work, wait for what runs, and stop.

    Raises:
        StartError: The gateway can't be built, or an address can't be used.
    """
    gateway = build_gateway(settings)
    sockets = [bind(settings.public), bind(settings.admin)]
    servers = [_server(gateway.public, settings.public), _server(gateway.admin, settings.admin)]
    await gateway.start()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    # What lives now lives for ever: the collector need never look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    tasks = [asyncio.create_task(server.serve([sock])) for server, sock in zip(servers, sockets, strict=True)]
    log.info("gateway listens", extra={"public": settings.public.port, "admin": settings.admin.port})
    await stopping.wait()
    log.info("gateway drains")
    await gateway.traffic.drain(settings.public.drain_s)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*tasks)
    await gateway.stop()


def main(argv: list[str] | None = None) -> int:
    """Run the gateway process; the supervisor starts it with settings that it has resolved."""
    parser = argparse.ArgumentParser(prog="python -m server.gateway", description="The gateway process.")
    parser.add_argument("--settings", type=Path, required=True, help="resolved settings, as JSON")
    args = parser.parse_args(argv)
    settings = parse_settings(json.loads(args.settings.read_text(encoding="utf-8")), base=Path("/"))
    setup_logging(settings.log_level)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two sockets a stream
    try:
        uvloop.run(serve(settings))
    except StartError as err:
        log.critical("the gateway must not start: %s", err, extra={"code": err.code})
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
