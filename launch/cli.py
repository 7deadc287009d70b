"""The command `moe-nvfp4`. Mistakes of the user end with one message and exit code 2."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_nvfp4 import __version__
from moe_nvfp4.errors import MoeNvfp4Error
from moe_nvfp4.launch.cli_bench import add_bench
from moe_nvfp4.launch.cli_generate import add_generate
from moe_nvfp4.launch.cli_serve import add_serve

USER_ERROR, BROKEN_CHECKPOINT, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return guarded(lambda: int(arguments.run(arguments)))


def guarded(run: Callable[[], int]) -> int:
    """The exit code of a command."""
    try:
        return run()
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
    add_generate(commands.add_parser("generate", help="generate text from a checkpoint"))
    add_serve(commands.add_parser("serve", help="serve models over HTTP, in the form of the OpenAI API"))
    _add_inspect(commands.add_parser("inspect", help="examine a checkpoint: headers and scales only"))
    _add_synthesize(commands.add_parser("synthesize", help="write a checkpoint of random values in a public layout"))
    add_bench(commands.add_parser("bench", help="measure"))
    return parser


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
