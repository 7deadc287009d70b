"""`generate` on several GPUs, one rank each:

ray job submit --working-dir . -- python -m moe_nvfp4.launch.generate --gpus N --model ... --prompt ...
python -m moe_nvfp4.launch.generate --gpus N ...       with a Ray cluster (RAY_ADDRESS), or one made on this machine
torchrun --nproc-per-node N -m moe_nvfp4.launch.generate ...                                            without Ray
"""

import argparse
import sys
from collections.abc import Sequence

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.cli import guarded
from moe_nvfp4.launch.cli_generate import add_generate, answer, prompt_of, sampling_of, settings_of
from moe_nvfp4.launch.cli_group import add_group_options, open_group


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_nvfp4.launch.generate", description="Generate text from a checkpoint on several GPUs."
    )
    add_generate(parser)
    add_group_options(parser)
    arguments = parser.parse_args(argv)
    return guarded(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.self_test:
        raise RequestError("--self-test: compares the kernels of one GPU; use `moe-nvfp4 generate --self-test`")
    prompt, sampling = prompt_of(arguments), sampling_of(arguments)
    with open_group(arguments, settings_of(arguments)) as runner:
        if runner is not None:
            runner.prompts.encode(prompt, sampling)
            answer(arguments, runner, getattr(runner, "load_seconds", 0.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
