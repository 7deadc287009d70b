"""`moe-nvfp4 bench schedule`, `balance` and `serve`: traffic, simulated or sent to a server; no model is loaded."""

import argparse
import math
from pathlib import Path
from typing import Any

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.cli_figures import numbers, pair, write


def add_traffic(kinds: Any) -> None:
    """`kinds`: what argparse's add_subparsers gives."""
    schedule = kinds.add_parser("schedule", help="simulate the scheduler: times to and between tokens; needs no GPU")
    schedule.add_argument("--requests", type=int, default=100_000, metavar="N", help="in all; default: %(default)s")
    schedule.add_argument("--trace", choices=("bursty", "long-tailed", "adversarial", "all"), default="all")
    schedule.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    schedule.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the distributions")
    schedule.set_defaults(run=_schedule)
    _add_balance(kinds.add_parser("balance", help="simulate skewed experts: how evenly ranks are loaded; needs no GPU"))
    _add_serve(kinds.add_parser("serve", help="requests at given rates to a server with OpenAI's API"))


def _add_balance(parser: argparse.ArgumentParser) -> None:
    models = ("qwen3-235b", "qwen3.5-397b", "qwen3.6-35b")
    parser.add_argument("--shape", choices=models, default="qwen3-235b", help="default: %(default)s")
    parser.add_argument("--ranks", default="8,64", metavar="N,...", help="default: %(default)s")
    parser.add_argument("--slots", default="2", metavar="N,...", help="beyond an even share; default: %(default)s")
    parser.add_argument("--trace", default="all", help="uniform, 'zipf 0.8', drifting or domains; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.set_defaults(run=_balance)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", metavar="ID", help="default: the first that the server names")
    parser.add_argument("--rates", default="1,2,4,8", metavar="R,...", help="requests a second; default: %(default)s")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="at each rate; default: %(default)s")
    parser.add_argument("--lengths", choices=("sharegpt", "log-uniform"), default="sharegpt")
    parser.add_argument("--prompt", default="128,4096", metavar="N,N", help="of log-uniform; default: %(default)s")
    parser.add_argument("--answer", default="16,512", metavar="N,N", help="of log-uniform; default: %(default)s")
    parser.add_argument("--vocab", type=int, metavar="N", help="prompts are token ids below N, not text")
    parser.add_argument("--chat", action="store_true", help="through /v1/chat/completions")
    parser.add_argument("--no-ignore-eos", action="store_true", help="for servers that do not know ignore_eos")
    parser.add_argument("--leaving", type=float, default=0.0, metavar="S", help="share of clients that leave early")
    parser.add_argument("--limit", type=float, default=1.0, metavar="S", help="on time to first token; default: 1 s")
    parser.add_argument("--find-rate", action="store_true", help="search the largest rate with p99 within the limit")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that send requests; default: 1")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request; default: 600 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw them")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    import asyncio
    import os

    try:
        from moe_nvfp4.launch.bench_serve import bench_serve
        from moe_nvfp4.launch.load_client import Target
    except ModuleNotFoundError as error:
        raise RequestError(f"bench serve needs {error.name}: pip install moe-nvfp4[serve]") from None
    from moe_nvfp4.launch.plot_serve import plot
    from moe_nvfp4.launch.serve_load import Load

    if arguments.chat and arguments.vocab is not None:
        raise RequestError("--vocab: chat messages are text; expected one of --chat and --vocab")
    load = Load(
        arguments.requests,
        arguments.lengths,
        prompt=pair("--prompt", arguments.prompt),
        answer=pair("--answer", arguments.answer),
        vocab=arguments.vocab,
        ignore_eos=not arguments.no_ignore_eos,
        seed=arguments.seed,
        leaving=arguments.leaving,
    )
    key = os.environ.get("OPENAI_API_KEY")
    target = Target(arguments.url, arguments.model, key, arguments.chat, arguments.timeout)
    rates = _rates(arguments.rates)
    figures = asyncio.run(
        bench_serve(
            target,
            load,
            rates,
            print,
            limit=arguments.limit,
            search=arguments.find_rate,
            processes=arguments.processes,
        )
    )
    write(arguments.json, figures)
    if arguments.plot is not None:
        arguments.plot.write_text(plot(figures))
    return 0


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise RequestError(f"--rates: got {text!r:.80}; expected requests a second, like 0.5,1,2")
    return rates


def _balance(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_balance import TRACES, bench_balance

    traces = TRACES if arguments.trace == "all" else (arguments.trace,)
    if not all(trace in TRACES for trace in traces):
        raise RequestError(f"--trace: got {arguments.trace!r:.80}; expected all or one of {', '.join(TRACES)}")
    ranks, slots = numbers("--ranks", arguments.ranks), numbers("--slots", arguments.slots, low=0)
    results = bench_balance(arguments.shape, ranks, slots, traces, print)
    write(arguments.json, {"what": "simulated loads; seconds on one CPU core", "results": results})
    return 0


def _schedule(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_schedule import TRACES, bench_schedule
    from moe_nvfp4.launch.plot_schedule import plot

    traces = TRACES if arguments.trace == "all" else (arguments.trace,)
    if arguments.requests < len(traces):
        raise RequestError(f"--requests: got {arguments.requests}; expected at least one for each trace")
    results = bench_schedule(traces, arguments.requests, print)
    write(arguments.json, {"what": "simulated: the scheduler against a model of step times", "traces": results})
    if arguments.plot is not None:
        arguments.plot.write_text(plot(results))
    return 0
