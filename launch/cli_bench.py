"""`moe-nvfp4 bench KIND`: arguments, and figures as a table and as JSON."""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

from moe_nvfp4.errors import RequestError

BROKEN_KERNEL = INCOMPLETE = 1


def add_bench(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    load = kinds.add_parser("load", help="seconds to load, against a plain sequential read of the same files")
    _add_model(load)
    load.add_argument("--runs", type=int, default=3)
    load.set_defaults(run=_load)
    kernels = kinds.add_parser("kernels", help="check the kernels on this GPU, and time them against its ceilings")
    kernels.add_argument("--shapes", default="qwen3.6,gemma-4", metavar="NAME,...", help="default: %(default)s")
    kernels.add_argument("--tokens", default="1,4,8,32,64,256,1024,4096", metavar="N,...", help="default: %(default)s")
    popular = ("uniform", "zipf", "one", "shared")
    kernels.add_argument("--routing", choices=popular, default="uniform", help="popular experts")
    kernels.add_argument("--compare", choices=("vllm",), help="time a peer's layer too, where it is installed")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    kernels.set_defaults(run=_kernels)
    decode = kinds.add_parser("decode", help="milliseconds of a decode step, by batch size")
    _add_model(decode)
    decode.add_argument("--batch", default="1,8,32", metavar="N,...", help="default: %(default)s")
    decode.add_argument("--context", type=int, default=128, metavar="N", help="prompt tokens; default: %(default)s")
    decode.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto")
    decode.add_argument("--eager", action="store_true", help="no CUDA graphs")
    decode.add_argument("--explain", action="store_true", help="where a step's time goes, kernel by kernel")
    decode.set_defaults(run=_decode)
    ep = kinds.add_parser("ep", help="milliseconds of a decode step over several ranks, against one")
    _add_ep(ep)
    prefill = kinds.add_parser("prefill", help="tokens a second of prompts, up to their first new token")
    _add_model(prefill)
    prefill.add_argument("--prompts", default="1,8", metavar="N,...", help="at once; default: %(default)s")
    prefill.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of each; default: %(default)s")
    prefill.set_defaults(run=_prefill)
    schedule = kinds.add_parser("schedule", help="simulate the scheduler: times to and between tokens; needs no GPU")
    schedule.add_argument("--requests", type=int, default=100_000, metavar="N", help="in all; default: %(default)s")
    schedule.add_argument("--trace", choices=("bursty", "long-tailed", "adversarial", "all"), default="all")
    schedule.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    schedule.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the distributions")
    schedule.set_defaults(run=_schedule)
    serve = kinds.add_parser("serve-offline", help="many requests of varied lengths at once, through the engine")
    _add_model(serve)
    serve.add_argument("--requests", type=int, default=1000, metavar="N", help="default: %(default)s")
    serve.add_argument("--prompt", default="128,4096", metavar="N,N", help="shortest and longest; default: %(default)s")
    serve.add_argument("--answer", default="16,512", metavar="N,N", help="shortest and longest; default: %(default)s")
    serve.add_argument("--shared", type=int, default=0, metavar="N", help="leading tokens that half of them share")
    serve.add_argument("--max-batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    serve.add_argument("--stretch", type=float, metavar="R", help="as of serve; default: inf, prompts are not cut")
    serve.add_argument("--no-prefix-reuse", action="store_true")
    serve.set_defaults(run=_serve_offline)
    _add_balance(kinds.add_parser("balance", help="simulate skewed experts: how evenly ranks are loaded; needs no GPU"))
    _add_serve(kinds.add_parser("serve", help="requests at given rates to a server with OpenAI's API"))


def _add_ep(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes, each with a GPU of its own")
    parser.add_argument(
        "--attention", default="replicated,tensor,data", metavar="MODE,...", help="default: %(default)s"
    )
    parser.add_argument("--batch", default="1,8,64,256", metavar="N,...", help="of all ranks; default: %(default)s")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="prompt tokens; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="time only modes that give one rank's tokens")
    parser.add_argument("--no-symmetric", action="store_true", help="all sums through NCCL, none in symmetric memory")
    parser.add_argument("--explain", action="store_true", help="what a step exchanges, and its share of the time")
    parser.set_defaults(run=_ep)


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
    parser.add_argument("--limit", type=float, default=1.0, metavar="S", help="on time to first token; default: 1 s")
    parser.add_argument("--find-rate", action="store_true", help="search the largest rate with p99 within the limit")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that send requests; default: 1")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request; default: 600 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw them")
    parser.set_defaults(run=_serve)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def _load(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_load import bench_load

    if arguments.runs < 1:
        raise RequestError(f"--runs: got {arguments.runs}; expected at least 1")
    report = bench_load(arguments.model, arguments.device, arguments.dtype, arguments.runs)
    print(report.table())
    _write(arguments.json, report.to_json())
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_kernels import bench_kernels

    tokens = _numbers("--tokens", arguments.tokens)
    figures = bench_kernels(arguments.shapes.split(","), tokens, arguments.routing, arguments.compare, print)
    _write(arguments.json, figures)
    return BROKEN_KERNEL if any(result["timing"] is None for result in figures["results"]) else 0


def _decode(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_model import bench_decode, places
    from moe_nvfp4.runner import MoERunner

    batches = _numbers("--batch", arguments.batch)
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=max(batches),
        max_seq_len=places(arguments.context),
        kv_dtype=arguments.kv_dtype,
        cuda_graphs=not arguments.eager,
        buckets=batches,
    )
    with MoERunner(prepared) as runner:
        ceiling = _ceiling(runner.device.type)
        results = bench_decode(
            runner,
            batches,
            arguments.context,
            bytes_per_second=ceiling,
            explained=arguments.explain and runner.device.type == "cuda",
            report=print,
        )
        _write(arguments.json, _where(arguments.model) | {"bytes_per_second": ceiling, "decode": results})
    return 0


def _ep(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_ep import bench_ep, is_complete
    from moe_nvfp4.launch.bench_ep_rank import Settings

    settings = Settings(
        model=arguments.model,
        device=arguments.device or "cuda",
        dtype=arguments.dtype,
        batches=tuple(_numbers("--batch", arguments.batch)),
        context=arguments.context,
        check=arguments.check,
        explain=arguments.explain,
        symmetric=not arguments.no_symmetric,
    )
    results = bench_ep(settings, arguments.ranks, arguments.attention.split(","), lambda line: print(line, flush=True))
    what = {"ranks": arguments.ranks, "context": arguments.context, "symmetric": settings.symmetric}
    _write(arguments.json, _where(arguments.model) | what | {"ep": results})
    return 0 if is_complete(results) else INCOMPLETE


def _prefill(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_model import bench_prefill
    from moe_nvfp4.runner import MoERunner

    prompts = _numbers("--prompts", arguments.prompts)
    if arguments.length < 1:
        raise RequestError(f"--length: got {arguments.length}; expected at least 1")
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=max(prompts),
        max_seq_len=arguments.length + 2,
        cuda_graphs=False,
    )
    with MoERunner(prepared) as runner:
        results = bench_prefill(runner, prompts, arguments.length, print)
        _write(arguments.json, _where(arguments.model) | {"prefill": results})
    return 0


def _serve_offline(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_serve_offline import Trace, bench_serve_offline
    from moe_nvfp4.runner import MoERunner

    prompt, answer = _pair("--prompt", arguments.prompt), _pair("--answer", arguments.answer)
    if arguments.shared < 0:
        raise RequestError(f"--shared: got {arguments.shared}; expected tokens, from 0")
    trace = Trace(arguments.requests, prompt, answer, arguments.shared)
    trace.check()
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=arguments.max_batch_size,
        max_seq_len=prompt[1] + answer[1],
        prefix_reuse=not arguments.no_prefix_reuse,
        stretch=math.inf if arguments.stretch is None else arguments.stretch,
        warm_up=True,
    )
    with MoERunner(prepared) as runner:
        figures = bench_serve_offline(runner, trace, print)
        _write(arguments.json, _where(arguments.model) | {"serve_offline": figures})
    return 0


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
        prompt=_pair("--prompt", arguments.prompt),
        answer=_pair("--answer", arguments.answer),
        vocab=arguments.vocab,
        ignore_eos=not arguments.no_ignore_eos,
        seed=arguments.seed,
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
    _write(arguments.json, figures)
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
    ranks, slots = _numbers("--ranks", arguments.ranks), _numbers("--slots", arguments.slots, low=0)
    results = bench_balance(arguments.shape, ranks, slots, traces, print)
    _write(arguments.json, {"what": "simulated loads; seconds on one CPU core", "results": results})
    return 0


def _schedule(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_schedule import TRACES, bench_schedule
    from moe_nvfp4.launch.plot_schedule import plot

    traces = TRACES if arguments.trace == "all" else (arguments.trace,)
    if arguments.requests < len(traces):
        raise RequestError(f"--requests: got {arguments.requests}; expected at least one for each trace")
    results = bench_schedule(traces, arguments.requests, print)
    _write(arguments.json, {"what": "simulated: the scheduler against a model of step times", "traces": results})
    if arguments.plot is not None:
        arguments.plot.write_text(plot(results))
    return 0


def _ceiling(device: str) -> float | None:
    """Bytes a second that this GPU reads, measured now."""
    from moe_nvfp4.launch.bench_timing import measure_read

    return measure_read() if device == "cuda" else None


def _where(model: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {"model": Path(model).name, "machine": name, "torch": torch.__version__}


def _numbers(option: str, text: str, *, low: int = 1) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < low:
        raise RequestError(f"{option}: got {text!r:.80}; expected numbers from {low}, like 1,8,64")
    return numbers


def _pair(option: str, text: str) -> tuple[int, int]:
    numbers = _numbers(option, text)
    if len(numbers) != 2:
        raise RequestError(f"{option}: got {text!r:.80}; expected two lengths, the shortest and the longest")
    return numbers[0], numbers[1]


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
