"""The threshold of a filter that keeps the largest logits: how far down a number or a mass of tokens reaches.

Bisection over float bit patterns, exact, without a sort. Blocks' peaks and sums bound the threshold from below. If few
blocks reach the bound they are read once, into registers. Else passes over them compare with three thresholds at a
time, first about those of a sample, until few blocks have tokens in the bracket that is left.

Device functions that kernels/sample.py calls. Letters as there; keys are without the SHIFT lowest bits, which are the
same in all logits of bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def find_threshold(
    logits_ptr, top_keys, mass, peak, scale, target, tail, low, ties, scratch_ptr, V, blocks,
    N: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest key such that tokens from it up reach `target`, in number or in mass; how many equal to it are
    needed; and the mass of all these. With mass, tokens below it may weigh at most `tail`.

    `low` and `ties` are what a filter before this left. The bracket: tokens from `low` up reach the target, and those
    from `high` up, which number `count` and weigh `weight`, do not.
    """
    b = tl.arange(0, BP)
    old_low, old_ties = low, ties
    low = tl.where(ties > 0, low, low + 1)
    high = key_of(peak, SHIFT) + 1
    count, weight = 0.0, 0.0
    # Bounds from blocks: as many tokens as blocks reach the peak of each; what lies below a key in a block weighs no
    # more than the block, nor than N times the key's weight.
    above, step = high, 0
    active = top_keys >= low
    number = tl.sum(active.to(tl.int32), 0)
    while (number > HELD) & (low + 1 < above) & (step < 16):
        middle = _between(low, above, 0.5, SHIFT)
        if COUNT:
            below = tl.sum((top_keys >= middle).to(tl.float32), 0) >= target
        else:
            below = tl.sum(tl.minimum(mass, N * weights_of(value_of(middle, SHIFT), peak, scale)), 0) <= tail * 0.9999
        low, above = tl.where(below, middle, low), tl.where(below, above, middle)
        active = top_keys >= low
        number = tl.sum(active.to(tl.int32), 0)
        step += 1
    number = list_blocks(scratch_ptr, active, b)
    first, third, step = _between(low, high, 0.25, SHIFT), _between(low, high, 0.75, SHIFT), 0
    low_count, low_weight = -1.0, 0.0  # not known
    if number > 4 * HELD:
        first, third = _estimate(
            logits_ptr, scratch_ptr, number, low, high, peak, scale, target, tail, V, N, HELD, SHIFT, COUNT
        )  # fmt: skip
    second = _between(first, third, 0.5, SHIFT)
    while (number > HELD) & (low + 1 < high):
        n1, n2, n3, w1, w2, w3 = _pass(
            logits_ptr, scratch_ptr, number, low, first, second, third, high, peak, scale, V, blocks,
            N, HELD // 4, SHIFT,
        )  # fmt: skip
        n1, n2, n3, w1, w2, w3 = n1 + count, n2 + count, n3 + count, w1 + weight, w2 + weight, w3 + weight
        if COUNT:
            up1, up2, up3 = n1 >= target, n2 >= target, n3 >= target
        else:
            up1, up2, up3 = w1 >= target, w2 >= target, w3 >= target
        low = tl.where(up3, third, tl.where(up2, second, tl.where(up1, first, low)))
        high = tl.where(up3, high, tl.where(up2, third, tl.where(up1, second, first)))
        low_count = tl.where(up3, n3, tl.where(up2, n2, tl.where(up1, n1, low_count)))
        low_weight = tl.where(up3, w3, tl.where(up2, w2, tl.where(up1, w1, low_weight)))
        count = tl.where(up3, count, tl.where(up2, n3, tl.where(up1, n2, n1)))
        weight = tl.where(up3, weight, tl.where(up2, w3, tl.where(up1, w2, w1)))
        numbers = tl.load(scratch_ptr + blocks + b, mask=active, other=0)
        part = 8 * (up1.to(tl.int32) + up2.to(tl.int32) + up3.to(tl.int32))  # of the bracket, low or high
        active &= ((numbers >> part) & 255) > tl.where(part == 24, 0, (numbers >> ((part + 8) & 31)) & 255)
        number = list_blocks(scratch_ptr, active, b)
        if COUNT:
            share = (low_count - target) / (low_count - count)
        else:
            share = (low_weight - target) / (low_weight - weight)
        first, second, third = _three(low, high, share, low_count - count, step, SHIFT)
        step += 1
    equal = tl.where(low_count >= 0, low_count - count, 1.0 * V)  # tokens at `low`, as far as they were counted
    if low + 1 < high:
        _, x = load_listed(logits_ptr, scratch_ptr, 0, number, V, HELD, N)
        key = key_of(x, SHIFT)
        inside = key < high
        if COUNT:
            worth, reached = tl.where(inside, 1.0, 0.0), count
        else:
            worth, reached = tl.where(inside, weights_of(x, peak, scale), 0.0), weight
        while low + 1 < high:
            middle = (low & high) + ((low ^ high) >> 1)
            below = reached + tl.sum(tl.where(key >= middle, worth, 0.0)) >= target
            low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        equal = tl.sum(tl.where(key == low, 1.0, 0.0))
        outside = inside & (key >= high)
        count += tl.sum(outside.to(tl.float32))
        weight += tl.sum(tl.where(outside, weights_of(value_of(key, SHIFT), peak, scale), 0.0))
    tie_weight = weights_of(value_of(low, SHIFT), peak, scale)
    if COUNT:
        ties = (target - count).to(tl.int32)
    else:
        # Rounding of the sums may ask for more than there are.
        ties = tl.minimum(tl.maximum(tl.ceil((target - weight) / tie_weight), 1.0), equal).to(tl.int32)
        ties = tl.where(low == old_low, tl.minimum(ties, old_ties), ties)
    return low, ties, weight + ties * tie_weight


@triton.jit
def _estimate(
    logits_ptr, list_ptr, number, low, high, peak, scale, target, tail, V,
    N: tl.constexpr, HELD: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Keys below and above the threshold, if a sample of the listed blocks is like all of them."""
    at = tl.load(list_ptr + tl.arange(0, HELD) * number // HELD)
    ids = at[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    key, ratio = key_of(x, SHIFT), number.to(tl.float32) / HELD
    if COUNT:
        worth = tl.where(key >= low, ratio, 0.0)
        margin = target * tl.minimum(3 * tl.sqrt(ratio / target), 0.5)
        goal = target
    else:
        worth = tl.where(key >= low, weights_of(x, peak, scale) * ratio, 0.0)
        margin = tail * 0.06
        goal = tl.sum(worth) - tail
    first, above, third, beyond = low, high, low, high
    for _ in range(14):
        one, two = _between(first, above, 0.5, SHIFT), _between(third, beyond, 0.5, SHIFT)
        up1 = tl.sum(tl.where(key >= one, worth, 0.0)) >= goal + margin
        up2 = tl.sum(tl.where(key >= two, worth, 0.0)) >= goal - margin
        first, above = tl.where(up1, one, first), tl.where(up1, above, one)
        third, beyond = tl.where(up2, two, third), tl.where(up2, beyond, two)
    first = tl.minimum(tl.maximum(first, low + 1), high - 1)
    return first, tl.minimum(tl.maximum(third, first), high - 1)


@triton.jit
def _pass(
    logits_ptr, scratch_ptr, number, low, first, second, third, high, peak, scale, V, blocks,
    N: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Of the listed blocks: number and weight of tokens from each threshold up to `high`. And each block's four numbers
    of tokens, from `low` and from the thresholds up, 8 bits each."""
    start, end = value_of(low, SHIFT), value_of(high, SHIFT)
    one, two, three = value_of(first, SHIFT), value_of(second, SHIFT), value_of(third, SHIFT)
    n1, n2, n3 = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    w1, w2, w3 = tl.zeros((TILE, N), tl.float32), tl.zeros((TILE, N), tl.float32), tl.zeros((TILE, N), tl.float32)
    for place in tl.range(0, number, TILE, num_stages=3):
        at, x = load_listed(logits_ptr, scratch_ptr, place, number, V, TILE, N)
        x = tl.where(x < end, x, float("-inf"))
        weight = weights_of(x, peak, scale)
        w1 += tl.where(x >= one, weight, 0.0)
        w2 += tl.where(x >= two, weight, 0.0)
        w3 += tl.where(x >= three, weight, 0.0)
        numbers = tl.where(x >= start, 1, 0) + tl.where(x >= one, 1 << 8, 0)
        numbers = tl.sum(numbers + tl.where(x >= two, 1 << 16, 0) + tl.where(x >= three, 1 << 24, 0), 1)
        n1 += (numbers >> 8) & 255
        n2 += (numbers >> 16) & 255
        n3 += (numbers >> 24) & 255
        tl.store(scratch_ptr + blocks + at, numbers, mask=place + tl.arange(0, TILE) < number)
    tl.debug_barrier()
    n1, n2, n3 = tl.sum(n1).to(tl.float32), tl.sum(n2).to(tl.float32), tl.sum(n3).to(tl.float32)
    return n1, n2, n3, tl.sum(w1), tl.sum(w2), tl.sum(w3)


@triton.jit
def _three(low, high, share, inside, step, SHIFT: tl.constexpr):
    """Three keys in the bracket, which holds `inside` tokens, if that is known: every other time close to where a
    straight line puts the target, else the quarters; by value while the bracket is wide, then by key, which ends for
    any values."""
    if step < 8:
        line = (inside > 0) & (step % 2 == 0)
        spread = tl.where(line, tl.minimum(tl.maximum(2 * tl.rsqrt(tl.maximum(inside, 1.0)), 0.004), 0.25), 0.25)
        share = tl.where(line, tl.minimum(tl.maximum(share, spread), 1 - spread), 0.5)
        first, third = _between(low, high, share - spread, SHIFT), _between(low, high, share + spread, SHIFT)
        second = _between(low, high, share, SHIFT)
    else:
        second = (low & high) + ((low ^ high) >> 1)
        first = tl.maximum((low & second) + ((low ^ second) >> 1), low + 1)
        third = (second & high) + ((second ^ high) >> 1)
    return first, second, third


@triton.jit
def list_blocks(list_ptr, active, b):
    """Writes the active blocks in ascending order; how many they are."""
    rank = tl.cumsum(active.to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(list_ptr + rank - 1, b, mask=active)
    tl.debug_barrier()
    return tl.max(rank, 0)


@triton.jit
def load_listed(logits_ptr, list_ptr, start, number, V, TILE: tl.constexpr, N: tl.constexpr):
    """Blocks of the list, their logits, -inf past the end."""
    place = start + tl.arange(0, TILE)
    at = tl.load(list_ptr + place, mask=place < number, other=0)
    ids = at[:, None] * N + tl.arange(0, N)[None, :]
    live = (place < number)[:, None] & (ids < V)
    return at, tl.load(logits_ptr + ids, mask=live, other=float("-inf")).to(tl.float32)


@triton.jit
def _between(low, high, share, SHIFT: tl.constexpr):
    key = key_of(value_of(low, SHIFT) * (1 - share) + value_of(high, SHIFT) * share, SHIFT)
    return tl.minimum(tl.maximum(key, low + 1), high - 1)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Integers in the order of floats, without their SHIFT lowest bits; -0.0 equals 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    key = key << SHIFT
    return (key ^ ((key >> 31) & (0x7FFFFFFF - ((1 << SHIFT) - 1)))).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(x, peak, scale):
    return tl.exp2((x - peak) * scale)
