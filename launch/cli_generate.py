"""`generate`: its options, and one answer streamed to the terminal; with one device, or over ranks in generate.py."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from moe_nvfp4.errors import RequestError

if TYPE_CHECKING:
    from moe_nvfp4.frontend import Frontend
    from moe_nvfp4.sampling import SamplingParams

BROKEN_KERNEL = 1


def add_generate(parser: argparse.ArgumentParser) -> None:
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
    add_deterministic(parser)
    parser.add_argument(
        "--self-test", action="store_true", help="first compare kernels with their float32 twins on these weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--quiet", action="store_true", help="no memory plan and no progress on standard error")
    parser.set_defaults(run=_generate)


def add_deterministic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deterministic", action="store_true", help="the same request gives the same tokens whatever else runs; slower"
    )


def sampling_of(arguments: argparse.Namespace) -> "SamplingParams":
    from moe_nvfp4.sampling import SamplingParams

    return SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
    )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """For `MoERunner.prepare`, but for the device."""
    return {
        "dtype": arguments.dtype,
        "max_batch_size": 1,
        "max_seq_len": arguments.max_seq_len,
        "kv_dtype": arguments.kv_dtype,
        "cuda_graphs": not arguments.eager,
        "deterministic": arguments.deterministic,
        "verbose": not arguments.quiet,
    }


def _generate(arguments: argparse.Namespace) -> int:
    from moe_nvfp4.runner import MoERunner
    from moe_nvfp4.self_test import self_test

    prompt, sampling = prompt_of(arguments), sampling_of(arguments)
    prepared = MoERunner.prepare(arguments.model, device=arguments.device, **settings_of(arguments))
    prepared.prompts.encode(prompt, sampling)  # a bad prompt is refused before the weights are loaded
    with MoERunner(prepared) as runner:
        if arguments.self_test and not self_test(runner, lambda line: print(line, file=sys.stderr)):
            return BROKEN_KERNEL
        answer(arguments, runner, runner.load_seconds)
    return 0


def answer(arguments: argparse.Namespace, runner: "Frontend", load_seconds: float) -> None:
    """Streams the answer, or prints it as JSON."""
    completion = None
    for increment in runner.stream(prompt_of(arguments), sampling_of(arguments)):
        if not arguments.json:
            print(increment.text if runner.tokenizer else f"{increment.token_ids[0]} ", end="", flush=True)
        completion = increment.completion
    assert completion is not None
    timing = {**dataclasses.asdict(completion.timing), "tokens_per_second": completion.timing.tokens_per_second}
    if arguments.json:
        fields = {"text": completion.text, "token_ids": completion.token_ids}
        fields |= {"finish_reason": completion.finish_reason}
        print(json.dumps({**fields, "timing": {**timing, "load": load_seconds}}), flush=True)
        return
    print()
    if not arguments.quiet:
        print(_summary(timing, load_seconds), file=sys.stderr)


def prompt_of(arguments: argparse.Namespace) -> Any:
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
