"""What launches are computed from, in plain Python and looked up once.

Outside a kernel Triton's own `cdiv` and `next_power_of_2` take 6 to 9 µs a call, and torch's lookups of a device some
more. With twenty of them a layer that made 10 ms of a prefill step, which the host must launch in 40.
"""

from functools import cache
from typing import Final

import torch
import triton

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)  # as the kernels' decorators have seen it


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, for n from 1."""
    return 1 << (n - 1).bit_length()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
