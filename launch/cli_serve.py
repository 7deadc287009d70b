"""`moe-nvfp4 serve`: models of one machine behind an OpenAI-compatible HTTP server."""

import argparse
import asyncio
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from moe_nvfp4.engine.scheduler import STRETCH
from moe_nvfp4.errors import EngineError, RequestError
from moe_nvfp4.launch.cli_generate import add_deterministic

if TYPE_CHECKING:
    import uvicorn

    from moe_nvfp4.launch.http_server import Server
    from moe_nvfp4.launch.http_settings import ServerSettings

KEYS_VARIABLE: Final = "MOE_NVFP4_API_KEYS"
BACKLOG: Final = 2048  # uvicorn's
LAST_SECONDS: Final = 5  # for connections to close, after the drain
UNREAD_SECONDS: Final = 60  # after which a connection whose peer takes no bytes ends


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"API keys: one a line in --api-key-file, or separated by commas in the variable {KEYS_VARIABLE}; "
        "without any, everybody who reaches the port may use the server."
    )
    parser.add_argument("--model", required=True, action="append", metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME", help="one for each --model; default: PATH"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32; default: by device")
    parser.add_argument("--max-batch-size", type=int, default=32, metavar="N", help="answers at once, of each model")
    parser.add_argument("--max-seq-len", type=int, metavar="N")
    parser.add_argument("--max-waiting", type=int, default=1024, metavar="N", help="requests that may wait for a place")
    parser.add_argument(
        "--stretch",
        type=float,
        default=STRETCH,
        metavar="R",
        help="how many times as long a step of answers may take for the prompts beside it; inf: most tokens a second, "
        "with long gaps between them; default: %(default)s",
    )
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of keys and values")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: the same steps, launch by launch")
    add_deterministic(parser)
    parser.add_argument(
        "--count-experts", action="store_true", help="count the rows of each expert, for the page; a launch a layer"
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE")
    parser.add_argument("--quiet", action="store_true", help="no memory plan and no line for each request")
    for name, text in (
        ("max-body-bytes", "largest request body"),
        ("max-choices", "largest n"),
        ("request-seconds", "most that an answer may take, waiting included"),
        ("drain-seconds", "most that running answers may take after SIGTERM"),
    ):
        kind = float if name.endswith("seconds") else int
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    parser.set_defaults(run=_serve)


def engine_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """For `MoERunner.prepare`, but for the device."""
    return {
        "dtype": arguments.dtype,
        "max_batch_size": arguments.max_batch_size,
        "max_seq_len": arguments.max_seq_len,
        "max_waiting": arguments.max_waiting,
        "stretch": arguments.stretch,
        "kv_dtype": arguments.kv_dtype,
        "cuda_graphs": not arguments.eager,
        "deterministic": arguments.deterministic,
        "count_experts": arguments.count_experts,
        "warm_up": True,
        "verbose": not arguments.quiet,
    }


def names_and_settings(arguments: argparse.Namespace) -> tuple[list[str], "ServerSettings"]:
    """What the models are called, and what the server allows."""
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise RequestError(f"{missing[0]} is not installed; pip install 'moe-nvfp4[serve]'")
    from moe_nvfp4.launch.http_settings import ServerSettings

    names: list[str] = arguments.served_model_name or arguments.model
    if len(names) != len(arguments.model) or len(set(names)) != len(names):
        raise RequestError(f"--served-model-name: got {names}; expected {len(arguments.model)} different names")
    given = {field.name: getattr(arguments, field.name, None) for field in fields(ServerSettings)}
    settings = ServerSettings(
        **{name: value for name, value in given.items() if value is not None} | {"api_keys": _keys(arguments)}
    )
    return names, settings


def _serve(arguments: argparse.Namespace) -> int:
    names, settings = names_and_settings(arguments)
    if not arguments.quiet:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("moe_nvfp4.http").setLevel(logging.INFO)
    with _listen(arguments.host, arguments.port) as listener:
        return asyncio.run(_run(arguments, names, settings, listener))


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """From a file or the environment, since everybody on the machine can read a command line."""
    lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    if arguments.api_key_file is not None:
        try:
            lines += arguments.api_key_file.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise RequestError(f"--api-key-file: {arguments.api_key_file} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if arguments.api_key_file is not None and not keys:
        raise RequestError(f"--api-key-file: {arguments.api_key_file} holds no key; write one a line")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a port in use is told at once; connections wait until it is."""
    if not 0 <= port < 65536:
        raise RequestError(f"--port {port}: expected a number from 0 to 65535")
    listener = socket.socket()
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener.close()
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RequestError(f"--host {host} --port {port}: cannot listen there: {error}") from error
    return listener


async def _run(
    arguments: argparse.Namespace, names: Sequence[str], settings: "ServerSettings", listener: socket.socket
) -> int:
    import uvicorn

    from moe_nvfp4.async_runner import AsyncMoERunner
    from moe_nvfp4.launch.http_app import create_app

    async with AsyncExitStack() as stack:
        runners = {}
        for name, path in zip(names, arguments.model, strict=True):
            runner = await AsyncMoERunner.from_pretrained(path, device=arguments.device, **engine_settings(arguments))
            runners[name] = await stack.enter_async_context(runner)
        app = create_app(runners, settings)
        server: Server = app.state.server
        broken = [name for name, decodes in (await server.ready()).items() if not decodes]
        if broken:
            raise EngineError(f"{broken[0]}: loaded, but it does not decode a token; see the log above")
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{port} with {', '.join(names)}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=LAST_SECONDS
        )
        await draining_server(config, server).serve(sockets=[listener])
    return 0


def draining_server(config: "uvicorn.Config", server: "Server") -> "uvicorn.Server":
    """A uvicorn server that, on the first signal, answers new requests with 503 until those that run are over; on the
    second, it ends at once."""
    import uvicorn

    class Draining(uvicorn.Server):
        _drain: asyncio.Task[None] | None = None

        async def serve(self, sockets: list[socket.socket] | None = None) -> None:
            self._loop = asyncio.get_running_loop()
            await super().serve(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self._drain is None and not server.draining:
                self._loop.call_soon_threadsafe(self._begin, sig)
            else:
                # What is cancelled now is uvicorn's own business, which it would log with tracebacks.
                logging.getLogger("uvicorn.error").disabled = True
                self.force_exit = self.should_exit = True

        def _begin(self, sig: int) -> None:
            print(f"{signal.Signals(sig).name}: draining", file=sys.stderr, flush=True)
            self._drain = asyncio.create_task(self._end())

        async def _end(self) -> None:
            await server.drain()
            self.should_exit = True

    return Draining(config)
