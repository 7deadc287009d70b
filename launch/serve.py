"""`python -m moe_nvfp4.launch.serve`: the HTTP server on a Ray cluster, or with a Ray of its own on this machine.

ray job submit --working-dir . -- python -m moe_nvfp4.launch.serve --model PATH --gpus N --replicas R --host 0.0.0.0

The app runs until the command gets SIGTERM or SIGINT; then it drains. Started again while it runs, with other
arguments, it replaces the app's replicas one after the other.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Literal

from moe_nvfp4.errors import EngineError, RequestError
from moe_nvfp4.launch.cli import guarded
from moe_nvfp4.launch.cli_group import add_group_options
from moe_nvfp4.launch.cli_serve import add_serve, engine_settings, names_and_settings

BEYOND_REQUESTS = 30.0  # seconds that a proxy waits longer than a replica does


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_nvfp4.launch.serve")
    add_serve(parser)
    add_group_options(parser)
    ray = parser.add_argument_group("Ray Serve")
    ray.add_argument("--replicas", type=int, default=1, metavar="N", help="each with --gpus GPUs for each model")
    ray.add_argument("--max-replicas", type=int, metavar="N", help="start more replicas under load, up to so many")
    ray.add_argument("--app", default="moe-nvfp4", metavar="NAME", help="default: %(default)s")
    ray.add_argument("--route-prefix", default="/", metavar="PATH", help="for several apps on one cluster")
    arguments = parser.parse_args(argv)
    return guarded(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    names, server = names_and_settings(arguments)
    if arguments.replicas < 1:
        raise RequestError(f"--replicas: got {arguments.replicas}; expected at least 1")
    if arguments.max_replicas is not None and arguments.max_replicas < arguments.replicas:
        raise RequestError(f"--max-replicas: got {arguments.max_replicas}; expected at least --replicas")
    device: Literal["cpu", "cuda"] = arguments.device or "cuda"
    if device not in ("cpu", "cuda"):
        raise RequestError(f"--device {device:.40}: expected cpu or cuda; replicas are given their GPUs")
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise RequestError(f"{error.name} is not installed; pip install 'moe-nvfp4[ray]'") from None
    from moe_nvfp4.launch.group_workers import GroupSettings, connect
    from moe_nvfp4.launch.serve_app import ReplicaSettings, build

    settings = ReplicaSettings(
        models=dict(zip(names, arguments.model, strict=True)),
        server=server,
        engine=engine_settings(arguments),
        group=GroupSettings(
            gpus=arguments.gpus or 1,
            device=device,
            attention=arguments.attention,
            strategy=arguments.strategy,
            hang_seconds=arguments.hang_seconds,
        ),
    )
    connect(device, not arguments.quiet)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())  # after Ray has set its own
    timeout = server.request_seconds + BEYOND_REQUESTS
    serve.start(http_options={"host": arguments.host, "port": arguments.port, "request_timeout_s": timeout})
    app = build(settings, arguments.replicas, arguments.max_replicas)
    try:
        serve.run(app, name=arguments.app, route_prefix=arguments.route_prefix)
    except RuntimeError as error:
        found = serve.status().applications[arguments.app].deployments.values()
        serve.delete(arguments.app)
        raise EngineError("\n".join(["the app did not start", *(one.message for one in found)])) from error
    shown = f"http://{arguments.host}:{arguments.port}{arguments.route_prefix.rstrip('/')}"
    print(f"serving {', '.join(names)} at {shown}, {arguments.replicas} replicas", file=sys.stderr, flush=True)
    over.wait()
    print("draining", file=sys.stderr, flush=True)
    serve.delete(arguments.app)
    return 0


if __name__ == "__main__":
    sys.exit(main())
