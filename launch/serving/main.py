"""One rank of `weft serve`: rank 0 drives the model and has the HTTP server on a thread, the others compute with it."""

import json
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
import uvicorn

from weft.launch.inference import open_session
from weft.launch.serving.app import Api
from weft.launch.serving.meters import Meters
from weft.launch.serving.protocol import ImpatientProtocol
from weft.launch.serving.service import Limits, Service
from weft.launch.signals import stop_request
from weft.launch.source import Source, open_source
from weft.launch.vocabulary import open_vocabulary

TOKEN_VARIABLE = "WEFT_API_KEY"
CONNECTIONS = 1024


def main(path: str, arguments: Sequence[str]) -> None:
    """Serve as the options, JSON in `arguments[0]`, say, until SIGINT or SIGTERM.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    options, overrides = json.loads(arguments[0]), arguments[1:]
    source = open_source(path, overrides)
    context = options["context"] or source.config.max_position_embeddings
    with stop_request() as stop:
        session = open_session(source, slots=options["slots"], capacity=context)
        try:
            if dist.get_rank() != 0:
                session.follow()
                return
            limits = Limits(
                session.scheduler.groups * session.scheduler.slots,
                options["queue"],
                context,
                min(options["max_tokens"] or context, context),
            )
            service = Service(options["name"] or source.settings.name, open_vocabulary(source), limits, Meters())
            server, thread = _start_server(service, source, options)
            try:
                service.drive(session, stop)
            finally:
                server.should_exit = True
                thread.join(10)
            session.close()
        finally:
            dist.destroy_process_group()


def _start_server(service: Service, source: Source, options: dict[str, Any]) -> tuple[uvicorn.Server, threading.Thread]:
    api = Api(service, source.config.vocab_size, os.environ.get(TOKEN_VARIABLE))
    opened = open_socket(options["host"], options["port"])
    config = uvicorn.Config(
        api.application(loopback=is_loopback(options["host"])),
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    parallel = source.settings.parallel
    layout = f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × data {parallel.data}"
    print(f"{service.name} ({layout}) listens on http://{shown}:{port}/v1; a page to try it on: http://{shown}:{port}/")
    print(
        "This is for trying and measuring a model on its own layout; to serve many users, take an inference server.",
        flush=True,
    )
    return server, thread


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket: clients may connect before the server takes up their connections.

    Raises:
        OSError: the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(CONNECTIONS)
    except OSError:
        opened.close()
        raise
    return opened


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
