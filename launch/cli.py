"""The command `moe-nvfp4`. Mistakes of the user end with one message and exit code 2."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_nvfp4 import __version__
from moe_nvfp4.errors import MoeNvfp4Error, RequestError
from moe_nvfp4.launch.cli_bench import add_bench
from moe_nvfp4.launch.cli_serve import add_serve

USER_ERROR, BROKEN_CHECKPOINT, BROKEN_KERNEL, INTERRUPTED = 2, 1, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except MoeNvfp4Error as error:
        print(f"moe-nvfp4: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; keep the interpreter from failing once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-nvfp4", description="Run NVFP4 mixture-of-experts checkpoints on GPUs without FP4 tensor cores."
    )
    parser.add_argument("--version", action="version", version=f"moe-nvfp4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="generate text from a checkpoint"))
    add_serve(commands.add_parser("serve", help="serve models over HTTP, in the form of the OpenAI API"))
    _add_inspect(commands.add_parser("inspect", help="examine a checkpoint: headers and scales only"))
    _add_synthesize(commands.add_parser("synthesize", help="write a checkpoint of random values in a public layout"))
    add_bench(commands.add_parser("bench", help="measure"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="checkpoint folder or hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--chat", metavar="TEXT", help="user message, put through the model's chat template")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids, for checkpoints without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32; default: by device")
    parser.add_argument("--max-seq-len", type=int, metavar="N")
    parser.add_argument(
        "--kv-dtype", choices=("auto", "fp8"), default="auto", help="of keys and values; default: --dtype"
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: the same steps, launch by launch")
    parser.add_argument(
        "--self-test", action="store_true", help="first compare kernels with their float32 twins on these weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--quiet", action="store_true", help="no memory plan and no progress on standard error")
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.runner import MoERunner
    from moe_nvfp4.sampling import SamplingParams
    from moe_nvfp4.self_test import self_test

    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
    )
    prompt = _prompt(arguments)
    prepared = MoERunner.prepare(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_size=1,
        max_seq_len=arguments.max_seq_len,
        kv_dtype=arguments.kv_dtype,
        cuda_graphs=not arguments.eager,
        verbose=not arguments.quiet,
    )
    prepared.prompts.encode(prompt, sampling)  # a bad prompt is refused before the weights are loaded
    with MoERunner(prepared) as runner:
        if arguments.self_test and not self_test(runner, lambda line: print(line, file=sys.stderr)):
            return BROKEN_KERNEL
        completion = None
        for increment in runner.stream(prompt, sampling):
            if not arguments.json:
                print(increment.text if runner.tokenizer else f"{increment.token_ids[0]} ", end="", flush=True)
            completion = increment.completion
        assert completion is not None
        timing = {**dataclasses.asdict(completion.timing), "tokens_per_second": completion.timing.tokens_per_second}
        if arguments.json:
            fields = {"text": completion.text, "token_ids": completion.token_ids}
            fields |= {"finish_reason": completion.finish_reason}
            print(json.dumps({**fields, "timing": {**timing, "load": runner.load_seconds}}))
        else:
            print()
            if not arguments.quiet:
                print(_summary(timing, runner.load_seconds), file=sys.stderr)
    return 0


def _prompt(arguments: argparse.Namespace) -> Any:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.chat is not None:
        return [{"role": "user", "content": arguments.chat}]
    try:
        return [int(token) for token in arguments.prompt_ids.split(",")]
    except ValueError:
        raise RequestError(f"--prompt-ids: got {arguments.prompt_ids!r:.80}; expected numbers like 1,2,3") from None


def _summary(timing: dict[str, Any], load: float) -> str:
    return (
        f"load {load:.2f} s, first token {timing['first_token']:.3f} s after {timing['prompt_tokens']} prompt tokens, "
        f"{timing['new_tokens']} tokens at {timing['tokens_per_second']:.1f} tok/s"
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.doctor import examine, render

    report = examine(arguments.path)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else render(report))
    return BROKEN_CHECKPOINT if report.broken else 0


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a published checkpoint, such as nvidia/Qwen3-30B-A3B-NVFP4")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not hold files")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--tiny", action="store_true", help="scale every dimension down; takes a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_synthesize)


def _synthesize(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.synthesize import synthesize

    synthesize(
        arguments.name, arguments.out, layers=arguments.layers, tiny=arguments.tiny, seed=arguments.seed,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
