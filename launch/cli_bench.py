"""`moe-nvfp4 bench KIND`: the kinds that load a model or run its kernels."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.cli_bench_traffic import add_traffic
from moe_nvfp4.launch.cli_figures import numbers, pair, where, write

if TYPE_CHECKING:
    import torch

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
    steps = kinds.add_parser("steps", help="steps of prompts beside answers: milliseconds to launch one, and in all")
    _add_model(steps)
    steps.add_argument("--rows", default="256,1024,2048,4096", metavar="N,...", help="default: %(default)s")
    steps.add_argument("--answers", default="0,128", metavar="N,...", help="rows of them; default: %(default)s")
    steps.add_argument("--eager", action="store_true", help="no CUDA graphs")
    steps.set_defaults(run=_steps)
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
    add_traffic(kinds)


def _add_ep(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="processes, each with a GPU of its own")
    parser.add_argument(
        "--attention", default="replicated,tensor,data", metavar="MODE,...", help="default: %(default)s"
    )
    parser.add_argument("--batch", default="1,8,64,256", metavar="N,...", help="of all ranks; default: %(default)s")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="prompt tokens; default: %(default)s")
    parser.add_argument(
        "--check", action="store_true", help="time only modes that give one rank's tokens; for real weights"
    )
    parser.add_argument("--no-symmetric", action="store_true", help="all exchanges through NCCL, none by inboxes")
    parser.add_argument("--explain", action="store_true", help="what a step exchanges, and its share of the time")
    parser.set_defaults(run=_ep)


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
    write(arguments.json, report.to_json())
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_kernels import bench_kernels

    tokens = numbers("--tokens", arguments.tokens)
    figures = bench_kernels(arguments.shapes.split(","), tokens, arguments.routing, arguments.compare, print)
    write(arguments.json, figures)
    return BROKEN_KERNEL if any(result["timing"] is None for result in figures["results"]) else 0


def _decode(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_model import bench_decode, places
    from moe_nvfp4.runner import MoERunner

    batches = numbers("--batch", arguments.batch)
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
        ceiling = _ceiling(runner.device)
        results = bench_decode(
            runner,
            batches,
            arguments.context,
            bytes_per_second=ceiling,
            explained=arguments.explain and runner.device.type == "cuda",
            report=print,
        )
        write(arguments.json, where(arguments.model) | {"bytes_per_second": ceiling, "decode": results})
    return 0


def _ep(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_ep import bench_ep, is_complete
    from moe_nvfp4.launch.bench_ep_rank import Settings

    settings = Settings(
        model=arguments.model,
        device=arguments.device or "cuda",
        dtype=arguments.dtype,
        batches=tuple(numbers("--batch", arguments.batch)),
        context=arguments.context,
        check=arguments.check,
        explain=arguments.explain,
        symmetric=not arguments.no_symmetric,
    )
    results = bench_ep(settings, arguments.ranks, arguments.attention.split(","), lambda line: print(line, flush=True))
    what = {"ranks": arguments.ranks, "context": arguments.context, "symmetric": settings.symmetric}
    write(arguments.json, where(arguments.model) | what | {"ep": results})
    return 0 if is_complete(results) else INCOMPLETE


def _prefill(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_model import bench_prefill
    from moe_nvfp4.runner import MoERunner

    prompts = numbers("--prompts", arguments.prompts)
    if arguments.length < 1:
        raise RequestError(f"--length: got {arguments.length}; expected at least 1")
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=max(prompts),
        max_seq_len=arguments.length + 2,
        buckets=[max(prompts)],
    )
    with MoERunner(prepared) as runner:
        results = bench_prefill(runner, prompts, arguments.length, print)
        write(arguments.json, where(arguments.model) | {"prefill": results})
    return 0


def _steps(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_steps import bench_steps, places, sequences
    from moe_nvfp4.runner import MoERunner

    rows, answers = numbers("--rows", arguments.rows), numbers("--answers", arguments.answers, low=0)
    if min(answers) >= min(rows):
        raise RequestError(f"--answers: got {arguments.answers!r:.80}; expected one below {min(rows)}, the fewest rows")
    count = sequences(rows, answers)
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=count,
        max_seq_len=places(),
        cuda_graphs=not arguments.eager,
        buckets=[count],
    )
    with MoERunner(prepared) as runner:
        write(arguments.json, where(arguments.model) | {"steps": bench_steps(runner, rows, answers, print)})
    return 0


def _serve_offline(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.launch.bench_serve_offline import Trace, bench_serve_offline
    from moe_nvfp4.runner import MoERunner

    prompt, answer = pair("--prompt", arguments.prompt), pair("--answer", arguments.answer)
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
        write(arguments.json, where(arguments.model) | {"serve_offline": figures})
    return 0


def _ceiling(device: "torch.device") -> float | None:
    """Bytes a second that this GPU reads, measured now."""
    from moe_nvfp4.launch.bench_timing import measure_read

    return measure_read(device) if device.type == "cuda" else None
