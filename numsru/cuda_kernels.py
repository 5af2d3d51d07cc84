"""The CUDA kernels, forward and backward, and the host functions that allocate their results and launch them.

A column is one (batch row, direction, unit): an independent recurrence. Kernels see every array as words of one number
or of two, those of neighbouring columns, and H below counts words. A block owns `columns` neighbouring words and goes
through time in tiles of `chunks * steps` steps; thread (tx, ty) owns word tx and chunk ty of each tile. While it
computes one tile, what it needs of the next is copied to shared memory. In version 1 each state is linear in the one
before, so a thread reduces its chunk to c -> decay c + offset; these pairs are exchanged through shared memory, and
every thread folds them, in the same order, to learn the state at the start of its chunk. Version 2 has one chunk.

Where columns are too few to fill a GPU, blocks also share out the time, a span of tiles to each: a first launch reduces
every span to c -> decay c + offset, and a second starts each block from these.

States are kept at the starts of backward's tiles only; backward computes those inside again. Gradients of parameters
are summed for each batch row in a fixed order, so results repeat their bits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numba import cuda, float32, float64, int32, int64, types, uint8, uint32, uint64
from numba.types import float16
from torch import Tensor

from . import cuda_launch
from .cuda_intrinsics import (
    BFLOAT16,
    WORDS,
    address,
    copy,
    device_function,
    finish_copies,
    narrow,
    pack,
    select,
    shared_address,
    shift,
    store,
    unpack,
)
from .recurrence import (
    ABSOLUTE_TANH,
    COARSE_TANH,
    LENGTHS,
    MASK,
    NO_PADDING,
    NO_SKIP,
    PACKED,
    SKIP_INPUT,
    SKIP_PROJECTED,
    STEPS_PER_STATE,
    TANH,
    Options,
    count_saved,
    forget_slope,
    gate,
    next_state,
    output,
    output_grads,
    state_grads,
)


class Tile(NamedTuple):
    """The shape of a block's work: `columns * chunks` threads, `steps` steps of time in each thread's registers."""

    columns: int  # in words
    chunks: int
    steps: int
    lanes: int = 1  # numbers in a word
    states: int = 1  # how many states of a tile forward keeps for backward, at equal distances


# What a launch does with the time: all of it in each block, or a span in each block, to reduce it or to compute it.
WHOLE, REDUCE_SPANS, SPANS = range(3)


class Storage(NamedTuple):
    """Numba types: of the numbers in u, x, h and their gradients; of all others, which is that of the arithmetic."""

    number: Any
    real: Any


STORAGE = {
    torch.float32: Storage(float32, float32),
    torch.float64: Storage(float64, float64),
    torch.float16: Storage(float16, float32),
    torch.bfloat16: Storage(BFLOAT16, float32),
}


@device_function
def _divide(a, b):
    """a // b. A division of 64 bits takes five times as long as one of 32."""
    return int64(uint32(a) // uint32(b))


@device_function
def _row_steps(valid, padding, b, L, B):
    """The steps of batch row b: where the first stands among all steps, how far the next is, and how many there are.

    Steps of padding count only where it may stand anywhere. Values that nobody has checked are brought into range.
    """
    if padding == PACKED:
        begin = min(max(valid[b], int64(0)), L)
        return begin, int64(1), min(max(valid[b + 1], begin), L) - begin
    if padding == LENGTHS:
        return b, B, min(max(valid[b], int64(0)), L)
    return b, B, L


@device_function
def _longest_row(valid, padding, first_row, last_row, L, B):
    """The most steps that a row of the block has: all its threads go through time together."""
    longest = int64(0)
    for b in range(first_row, last_row + 1):
        longest = max(longest, _row_steps(valid, padding, b, L, B)[2])
    return longest


@device_function
def _count_rest(padding, begin, steps, L, b, B):
    """Steps behind the last of batch row b that no row takes: they are padding."""
    if padding == LENGTHS:
        return L - steps
    return L - begin - steps if b == B - 1 else int64(0)


@device_function
def _saved_at(index, begin, padding, distance, b, B):
    """Where the index-th state of a row is kept, `distance` steps behind the one before: distinct for all rows."""
    if padding == PACKED:
        return begin // distance + b + index
    return index * B + b


@device_function
def _is_padding(k, left, padded, padding):
    """Whether the k-th step of a thread is padding or does not exist: only `left` of them do."""
    if padding == MASK:
        return (padded >> int32(k)) & 1 != 0
    return k >= left


@device_function
def _find_padding(mask_pad, position, stride, left, chunk):
    """One bit for each of a thread's steps that is padding or does not exist."""
    padded = int32(0)
    for k in range(chunk):
        if k >= left or mask_pad[position + k * stride] != 0:
            padded |= int32(1) << int32(k)
    return padded


@device_function
def _copy_steps(to, spacing, chunk, left, from_u, from_x, between, step_u, step_x, skip_kind, stage):
    """Begin to copy a thread's steps of u and of the highway's input. Returns where the steps behind them lie."""
    for k in range(chunk):
        copy(to, k * spacing, from_u, k, left)
        copy(to, (chunk + k) * spacing, shift(from_u, 1, between), k, left)
        if stage != REDUCE_SPANS:
            copy(to, (2 * chunk + k) * spacing, shift(from_u, 2, between), k, left)
            if skip_kind == SKIP_PROJECTED:
                copy(to, (3 * chunk + k) * spacing, shift(from_u, 3, between), k, left)
            elif skip_kind == SKIP_INPUT:
                copy(to, (3 * chunk + k) * spacing, from_x, k, left)
                from_x = shift(from_x, 1, step_x)
        from_u = shift(from_u, 1, step_u)
    return from_u, from_x


@device_function
def _skip_value(word, i, scale_x, number, skip_kind):
    if skip_kind == SKIP_INPUT:
        return scale_x * unpack(word, i, number)
    return unpack(word, i, number) if skip_kind == SKIP_PROJECTED else type(scale_x)(0)


@device_function
def _linear_steps(candidate, forget, decay, offset, bias_f, left, padded, padding, chunk, lanes, real):
    """Version 1: the forget gates, which see no state, and a thread's steps as one: c -> decay c + offset."""
    one, zero = real(1), real(0)
    for j in range(lanes):
        decay[j], offset[j] = one, zero
    for k in range(chunk):
        is_padding = _is_padding(k, left, padded, padding)
        for j in range(lanes):
            i = k * lanes + j
            f = gate(forget[i], unpack(bias_f, j, real), zero, zero, 1)
            forget[i] = select(is_padding, one, f)  # a step of padding becomes c -> 1 c + 0
            if padding == MASK and is_padding:
                candidate[i] = zero
            decay[j] = decay[j] * forget[i]
            offset[j] = next_state(forget[i], candidate[i], offset[j])


@device_function
def _find_column(width, L, B, D, H, valid, padding):
    """The column of a thread, the steps of its row, and the most steps that a row of the block has."""
    columns = B * D * H
    first_col = int64(cuda.blockIdx.x) * width
    col = first_col + int64(cuda.threadIdx.x)
    inside = col < columns
    col = min(col, columns - 1)  # a thread beyond the last column reads that column's state and writes nothing
    col = int64(narrow(col))
    row = _divide(col, H)
    b = row if D == 1 else row >> 1
    begin, stride, steps = _row_steps(valid, padding, b, L, B)
    longest = L
    if padding in (LENGTHS, PACKED):  # rows have different numbers of steps
        last_col = min(first_col + width, columns) - 1
        longest = _longest_row(valid, padding, _divide(first_col, H * D), _divide(last_col, H * D), L, B)
    return inside, col, row, col - row * H, b, row - b * D, begin, stride, steps, longest


@functools.cache
def forward_kernel(options: Options, storage: Storage, tile: Tile, stage: int = WHOLE) -> Callable[..., None]:
    """One launch writes h, c_n and, with `save_c`, states at equal distances."""
    version, nonlinearity, placement, skip_kind, padding, has_c_0, has_mask_c, save_c = options
    width, chunks, chunk, lanes, kept = tile
    assert version == 1 or chunks == 1
    number, real = storage
    word, real_word = words(storage, lanes)
    parts, tile_length = options.parts, chunks * chunk
    threads, numbers, last = chunks * width, chunk * lanes, lanes - 1
    if number == BFLOAT16 and nonlinearity == TANH:
        nonlinearity = COARSE_TANH
    copies = 2 if stage == REDUCE_SPANS else 3 + (skip_kind != NO_SKIP)  # words of a step
    held = copies * chunk * threads
    exchanged, distance, chunks_per_state = 2 * threads, tile_length // kept, chunks // kept

    def forward(
        u, x, bias, weight_c, c_0, mask_c, valid, h, c_n, saved, span_decay, span_offset,
        scale_x, L, B, D, H, span_tiles,
    ):  # fmt: skip
        decays = cuda.shared.array(exchanged, real_word)
        offsets = cuda.shared.array(exchanged, real_word)
        copied = cuda.shared.array(held, word)
        candidate = cuda.local.array(numbers, real)
        forget = cuda.local.array(numbers, real)
        reset = cuda.local.array(chunk, word)
        skip = cuda.local.array(chunk, word)
        carry = cuda.local.array(lanes, real)  # the state at the start of a tile
        span = cuda.local.array(lanes, real)  # the decay of all tiles so far
        c = cuda.local.array(lanes, real)
        decay = cuda.local.array(lanes, real)
        offset = cuda.local.array(lanes, real)
        h_k = cuda.local.array(lanes, real)
        one, zero = real(1), real(0)

        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        inside, col, _, unit, b, d, begin, stride, steps, longest = _find_column(width, L, B, D, H, valid, padding)
        gate_f = d * 2 * H + unit
        gate_r = gate_f + H
        bias_f, bias_r = bias[gate_f], bias[gate_r]
        weight_f = weight_c[gate_f] if version == 2 else real_word(0)
        weight_r = weight_c[gate_r] if version == 2 else real_word(0)
        mask = mask_c[col] if has_mask_c else real_word(0)
        c_start = c_0[col] if has_c_0 and stage != REDUCE_SPANS else real_word(0)
        for j in range(lanes):
            carry[j] = unpack(c_start, j, real)
            span[j] = one

        tiles = (longest + tile_length - 1) // tile_length
        first_tile, end_tile, y = int64(0), tiles, int64(cuda.blockIdx.y)
        if stage != WHOLE:
            first_tile = min(y * span_tiles, tiles)
            end_tile = min(first_tile + span_tiles, tiles)
        if stage == SPANS:
            for i in range(y):
                at = i * B * D * H + col
                for j in range(lanes):
                    carry[j] = unpack(span_decay[at], j, real) * carry[j] + unpack(span_offset[at], j, real)

        first = first_tile * tile_length + ty * chunk
        left = narrow((steps if inside else int64(0)) - first)  # steps from this thread's first on
        if d == 1:
            first, stride = steps - 1 - first, -stride
            position = begin - first * stride
        else:
            position = begin + first * stride
        state = first_tile * kept + ty // chunks_per_state
        at_state = address(saved, _saved_at(state, begin, padding, distance, b, B) * D * H + d * H + unit)
        step_x, step_u = int32(stride * D * H), int32(stride * D * H * parts)
        step_saved = int32(D * H if padding == PACKED else B * D * H)
        at_x = (position * D + d) * H + unit
        at_u = (position * D + d) * parts * H + unit
        between = int32(H)  # parts of u
        from_u = address(u, at_u)
        from_x = address(x, at_x) if skip_kind == SKIP_INPUT else from_u
        to_h = address(h, at_x)
        slot = uint64(tx)

        tiles_left = narrow(end_tile - first_tile)
        ahead = left if tiles_left > 0 else int32(0)
        own = uint64(ty * width + tx)
        to = shared_address(copied, int64(own))
        from_u, from_x = _copy_steps(
            to, threads, chunk, ahead, from_u, from_x, between, step_u, step_x, skip_kind, stage
        )
        while tiles_left > 0:
            tiles_left = int32(tiles_left - 1)
            padded = _find_padding(valid, position, stride, left, chunk) if padding == MASK else int32(0)
            finish_copies()
            for k in range(chunk):
                for j in range(lanes):
                    candidate[k * lanes + j] = unpack(copied[own + uint64(k * threads)], j, number)
                    forget[k * lanes + j] = unpack(copied[own + uint64((chunk + k) * threads)], j, number)
                if stage != REDUCE_SPANS:
                    reset[k] = copied[own + uint64((2 * chunk + k) * threads)]
                    if skip_kind != NO_SKIP:
                        skip[k] = copied[own + uint64((3 * chunk + k) * threads)]
            # Copies of the next tile, which arrive while this one is computed.
            ahead = int32(left - tile_length) if tiles_left > 0 else int32(0)
            from_u, from_x = shift(from_u, tile_length - chunk, step_u), shift(from_x, tile_length - chunk, step_x)
            from_u, from_x = _copy_steps(
                to, threads, chunk, ahead, from_u, from_x, between, step_u, step_x, skip_kind, stage
            )
            if version == 1:
                _linear_steps(
                    candidate, forget, decay, offset, bias_f, left, padded, padding, chunk, lanes, real
                )  # fmt: skip
            for j in range(lanes):
                c[j] = carry[j]
            if chunks > 1:
                decays[slot + uint64(ty * width)] = pack(decay[0], decay[last], real, real_word)
                offsets[slot + uint64(ty * width)] = pack(offset[0], offset[last], real, real_word)
                cuda.syncthreads()
                for j in range(lanes):
                    for i in range(chunks):
                        if i == ty:
                            c[j] = carry[j]
                        decay_i = unpack(decays[slot + uint64(i * width)], j, real)
                        carry[j] = decay_i * carry[j] + unpack(offsets[slot + uint64(i * width)], j, real)
                        if stage == REDUCE_SPANS:
                            span[j] = decay_i * span[j]
                # The next tile writes where nobody reads any more: one barrier is enough.
                slot = uint64(threads + 2 * tx) - slot

            if stage != REDUCE_SPANS:
                if save_c and ty % chunks_per_state == 0:
                    store(at_state, 0, left, pack(c[0], c[last], real, real_word))
                for k in range(chunk):
                    is_padding = _is_padding(k, left, padded, padding)
                    for j in range(lanes):
                        f, c_prev = forget[k * lanes + j], c[j]
                        if version == 2:
                            f = gate(f, unpack(bias_f, j, real), unpack(weight_f, j, real), c_prev, version)
                        r = gate(
                            unpack(reset[k], j, number),
                            unpack(bias_r, j, real),
                            unpack(weight_r, j, real),
                            c_prev,
                            version,
                        )
                        c_next = next_state(f, candidate[k * lanes + j], c_prev)
                        c[j] = c_prev if version == 2 and is_padding else c_next
                        skipped = _skip_value(skip[k], j, scale_x, number, skip_kind)
                        m = unpack(mask, j, real) if has_mask_c else one
                        h_kj = output(c[j], r, skipped, m, nonlinearity, placement)
                        h_k[j] = zero if padding == MASK and is_padding else h_kj
                    store(to_h, k, left, pack(h_k[0], h_k[last], number, word))
                    to_h = shift(to_h, 1, step_x)
            if chunks == 1:
                for j in range(lanes):
                    carry[j] = c[j]
            left = int32(left - tile_length)
            position += tile_length * stride
            to_h = shift(to_h, tile_length - chunk, step_x)
            at_state = shift(at_state, kept, step_saved)

        if stage == REDUCE_SPANS:
            if inside and ty == 0:
                span_decay[y * B * D * H + col] = pack(span[0], span[last], real, real_word)
                span_offset[y * B * D * H + col] = pack(carry[0], carry[last], real, real_word)
        else:
            if inside and ty == 0 and (stage == WHOLE or y == int64(cuda.gridDim.y) - 1):
                c_n[col] = pack(carry[0], carry[last], real, real_word)
            if inside and padding in (LENGTHS, PACKED):
                spans = int64(cuda.gridDim.y)
                rest = _count_rest(padding, begin, steps, L, b, B)
                for i in range(y * chunks + ty, rest, spans * chunks):
                    h[((begin + (steps + i) * abs(stride)) * D + d) * H + unit] = word(0)

    return forward


@functools.cache
def backward_kernel(options: Options, storage: Storage, tile: Tile, stage: int = WHOLE) -> Callable[..., None]:
    """One launch writes grad_u, grad_x, grad_c_0 and each row's sums over time for the gradients of the parameters."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, _ = options
    width, chunks, chunk, lanes, _ = tile
    assert version == 1 or chunks == 1
    number, real = storage
    if number == BFLOAT16 and nonlinearity == TANH and skip_kind != NO_SKIP:
        nonlinearity = ABSOLUTE_TANH  # of g - x: without x, the small ones count
    word, real_word = words(storage, lanes)
    parts, tile_length, threads = options.parts, chunks * chunk, chunks * width
    exchanged, numbers, last = 2 * threads, chunk * lanes, lanes - 1
    if stage == REDUCE_SPANS:
        skip_kind = NO_SKIP  # the gradient of c does not depend on the highway's input
    copies = 4 + (skip_kind != NO_SKIP)  # words of a step
    held = copies * chunk * threads

    def backward(
        u, x, bias, weight_c, mask_c, valid, saved, grad_h, grad_c_n, grad_u, grad_x, grad_c_0, sum_bias, sum_weight_c,
        span_decay, span_offset, scale_x, L, B, D, H, span_tiles,
    ):  # fmt: skip
        decays = cuda.shared.array(exchanged, real_word)
        offsets = cuda.shared.array(exchanged, real_word)
        grad_offsets = cuda.shared.array(threads, real_word)
        copied = cuda.shared.array(held, word)
        copied_state = cuda.shared.array(threads, real_word)
        candidate = cuda.local.array(numbers, real)
        forget = cuda.local.array(numbers, real)
        reset = cuda.local.array(chunk, word)
        skip = cuda.local.array(chunk, word)
        grad_out = cuda.local.array(chunk, word)
        states = cuda.local.array(numbers, real)  # before each step
        slope = cuda.local.array(numbers, real)
        through_h = cuda.local.array(numbers, real)  # dL/dc through the same step's h
        grad_reset = cuda.local.array(numbers, real)
        carry = cuda.local.array(lanes, real)
        grad_carry = cuda.local.array(lanes, real)  # dL/dc at the end of a tile
        span = cuda.local.array(lanes, real)  # the decay of all tiles so far
        c = cuda.local.array(lanes, real)
        decay = cuda.local.array(lanes, real)
        offset = cuda.local.array(lanes, real)
        sum_f = cuda.local.array(lanes, real)
        sum_r = cuda.local.array(lanes, real)
        sum_weight_f = cuda.local.array(lanes, real)
        sum_weight_r = cuda.local.array(lanes, real)
        out_0 = cuda.local.array(lanes, real)
        out_1 = cuda.local.array(lanes, real)
        one, zero = real(1), real(0)

        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        inside, col, row, unit, b, d, begin, stride, steps, longest = _find_column(width, L, B, D, H, valid, padding)
        gate_f = d * 2 * H + unit
        gate_r = gate_f + H
        bias_f, bias_r = bias[gate_f], bias[gate_r]
        weight_f = weight_c[gate_f] if version == 2 else real_word(0)
        weight_r = weight_c[gate_r] if version == 2 else real_word(0)
        mask = mask_c[col] if has_mask_c else real_word(0)
        grad_end = grad_c_n[col] if stage != REDUCE_SPANS else real_word(0)
        for j in range(lanes):
            grad_carry[j] = unpack(grad_end, j, real)
            span[j] = one
            sum_f[j] = zero
            sum_r[j] = zero
            sum_weight_f[j] = zero
            sum_weight_r[j] = zero

        tiles = (longest + tile_length - 1) // tile_length
        first_tile, end_tile, y, spans = int64(0), tiles, int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        if stage != WHOLE:
            first_tile = min(y * span_tiles, tiles)
            end_tile = min(first_tile + span_tiles, tiles)
        if stage == SPANS:
            for i in range(spans - 1, y, -1):
                at = i * B * D * H + col
                for j in range(lanes):
                    grad_carry[j] = unpack(span_decay[at], j, real) * grad_carry[j] + unpack(span_offset[at], j, real)

        first = (end_tile - 1) * tile_length + ty * chunk
        left = narrow((steps if inside else int64(0)) - first)  # steps from this thread's first on
        if d == 1:
            first, stride = steps - 1 - first, -stride
            position = begin - first * stride
        else:
            position = begin + first * stride
        state = _saved_at(end_tile - 1, begin, padding, tile_length, b, B)
        at_state = address(saved, state * D * H + d * H + unit)
        step_x, step_u = int32(stride * D * H), int32(stride * D * H * parts)
        step_saved = int32(D * H if padding == PACKED else B * D * H)
        at_x = (position * D + d) * H + unit
        at_u = (position * D + d) * parts * H + unit
        between = int32(H)  # parts of u
        from_u = address(u, at_u)
        from_x = address(x, at_x) if skip_kind == SKIP_INPUT else from_u
        from_grad_h = address(grad_h, at_x)
        to_u = address(grad_u, at_u)
        to_x = address(grad_x, at_x) if skip_kind == SKIP_INPUT else to_u
        slot = uint64(tx)

        tiles_left = narrow(end_tile - first_tile)
        ahead = left if tiles_left > 0 else int32(0)
        own = uint64(ty * width + tx)
        to = shared_address(copied, int64(own))
        from_u, from_x = _copy_steps(
            to, threads, chunk, ahead, from_u, from_x, between, step_u, step_x, skip_kind, WHOLE
        )
        for k in range(chunk):
            copy(to, ((copies - 1) * chunk + k) * threads, from_grad_h, k, ahead)
            from_grad_h = shift(from_grad_h, 1, step_x)
        to_state = shared_address(copied_state, int64(own))
        copy(to_state, 0, at_state, 0, ahead if ty == 0 else int32(0))
        while tiles_left > 0:
            tiles_left = int32(tiles_left - 1)
            padded = _find_padding(valid, position, stride, left, chunk) if padding == MASK else int32(0)
            finish_copies()
            for k in range(chunk):
                for j in range(lanes):
                    candidate[k * lanes + j] = unpack(copied[own + uint64(k * threads)], j, number)
                    forget[k * lanes + j] = unpack(copied[own + uint64((chunk + k) * threads)], j, number)
                reset[k] = copied[own + uint64((2 * chunk + k) * threads)]
                if skip_kind != NO_SKIP:
                    skip[k] = copied[own + uint64((3 * chunk + k) * threads)]
                grad_out[k] = copied[own + uint64(((copies - 1) * chunk + k) * threads)]
            for j in range(lanes):
                carry[j] = unpack(copied_state[own], j, real)
                c[j] = carry[j]
            # Copies of the next tile, which arrive while this one is computed.
            ahead = int32(left + tile_length) if tiles_left > 0 else int32(0)
            from_u, from_x = shift(from_u, -tile_length - chunk, step_u), shift(from_x, -tile_length - chunk, step_x)
            from_grad_h = shift(from_grad_h, -tile_length - chunk, step_x)
            at_state = shift(at_state, -1, step_saved)
            from_u, from_x = _copy_steps(
                to, threads, chunk, ahead, from_u, from_x, between, step_u, step_x, skip_kind, WHOLE
            )
            for k in range(chunk):
                copy(to, ((copies - 1) * chunk + k) * threads, from_grad_h, k, ahead)
                from_grad_h = shift(from_grad_h, 1, step_x)
            copy(to_state, 0, at_state, 0, ahead if ty == 0 else int32(0))
            if version == 1:
                _linear_steps(
                    candidate, forget, decay, offset, bias_f, left, padded, padding, chunk, lanes, real
                )  # fmt: skip
            # The states inside the tile, as in forward.
            if chunks > 1:
                # To the other chunks, the state at the start of the tile is part of what the first one adds.
                for j in range(lanes):
                    offset[j] += decay[j] * carry[j]
                decays[slot + uint64(ty * width)] = pack(decay[0], decay[last], real, real_word)
                offsets[slot + uint64(ty * width)] = pack(offset[0], offset[last], real, real_word)
                cuda.syncthreads()
                for j in range(lanes):
                    for i in range(chunks):
                        if i == ty:
                            c[j] = carry[j]
                        decay_i = unpack(decays[slot + uint64(i * width)], j, real)
                        carry[j] = decay_i * carry[j] + unpack(offsets[slot + uint64(i * width)], j, real)

            # All gradients that need no dL/dc from later steps. Those of steps that do not exist are 0: so is what was
            # read of them, and in version 1 their forget gate is 1. And dL/dc in front of each step is linear in dL/dc
            # behind it: a thread's steps as one, from the end to the start.
            for j in range(lanes):
                decay[j], offset[j] = one, zero
            for k in range(chunk):
                is_padding = _is_padding(k, left, padded, padding)
                for j in range(lanes):
                    i = k * lanes + j
                    states[i] = c[j]
                    if version == 2:
                        forget[i] = gate(forget[i], unpack(bias_f, j, real), unpack(weight_f, j, real), c[j], version)
                    r = gate(
                        unpack(reset[k], j, number), unpack(bias_r, j, real), unpack(weight_r, j, real), c[j], version
                    )
                    c_next = next_state(forget[i], candidate[i], c[j])
                    c[j] = c[j] if version == 2 and is_padding else c_next
                    skipped = _skip_value(skip[k], j, scale_x, number, skip_kind)
                    m = unpack(mask, j, real) if has_mask_c else one
                    g_reset, g_skip, through_h[i] = output_grads(
                        unpack(grad_out[k], j, number), c[j], r, skipped, m, nonlinearity, placement
                    )
                    slope[i] = forget_slope(states[i], forget[i], candidate[i])
                    if padding == MASK or version == 2:
                        g_reset, g_skip = select(is_padding, zero, g_reset), select(is_padding, zero, g_skip)
                        through_h[i] = select(is_padding, zero, through_h[i])
                        slope[i] = select(is_padding, zero, slope[i])
                    if version == 2:
                        forget[i] = select(is_padding, one, forget[i])  # what is read there may be NaN
                    decay[j] = decay[j] * forget[i]
                    offset[j] += decay[j] * through_h[i]
                    grad_reset[i] = g_reset
                    sum_r[j] += g_reset
                    if version == 2:
                        sum_weight_r[j] += g_reset * states[i]
                    out_0[j] = g_reset
                    out_1[j] = scale_x * g_skip if skip_kind == SKIP_INPUT else g_skip
                if stage != REDUCE_SPANS:
                    store(shift(to_u, 2, between), k, left, pack(out_0[0], out_0[last], number, word))
                    if skip_kind == SKIP_PROJECTED:
                        store(shift(to_u, 3, between), k, left, pack(out_1[0], out_1[last], number, word))
                    elif skip_kind == SKIP_INPUT:
                        store(to_x, k, left, pack(out_1[0], out_1[last], number, word))
                        to_x = shift(to_x, 1, step_x)
                    to_u = shift(to_u, 1, step_u)

            for j in range(lanes):
                c[j] = grad_carry[j]
            if chunks > 1:
                grad_offsets[uint64(tx) + uint64(ty * width)] = pack(offset[0], offset[last], real, real_word)
                cuda.syncthreads()
                for j in range(lanes):
                    for i in range(chunks - 1, -1, -1):
                        if i == ty:
                            c[j] = grad_carry[j]
                        decay_i = unpack(decays[slot + uint64(i * width)], j, real)
                        grad_carry[j] = decay_i * grad_carry[j] + unpack(grad_offsets[uint64(tx + i * width)], j, real)
                        if stage == REDUCE_SPANS:
                            span[j] = decay_i * span[j]
                slot = uint64(threads + 2 * tx) - slot
            for k in range(chunk - 1, -1, -1):
                is_padding = _is_padding(k, left, padded, padding)
                for j in range(lanes):
                    i = k * lanes + j
                    g_candidate, g_forget, g_c = state_grads(
                        c[j] + through_h[i],
                        grad_reset[i],
                        slope[i],
                        forget[i],
                        unpack(weight_f, j, real),
                        unpack(weight_r, j, real),
                        version,
                    )
                    if padding != NO_PADDING and is_padding:  # 0 even where dL/dc is infinite or NaN
                        g_candidate, g_forget = zero, zero
                    if version == 2 and is_padding:
                        g_c = c[j]
                    c[j] = g_c
                    sum_f[j] += g_forget
                    if version == 2:
                        sum_weight_f[j] += g_forget * states[i]
                    out_0[j] = g_candidate
                    out_1[j] = g_forget
                if stage != REDUCE_SPANS:
                    to_u = shift(to_u, -1, step_u)
                    store(to_u, k, left, pack(out_0[0], out_0[last], number, word))
                    store(shift(to_u, 1, between), k, left, pack(out_1[0], out_1[last], number, word))
            if chunks == 1:
                for j in range(lanes):
                    grad_carry[j] = c[j]
            left = int32(left + tile_length)
            position -= tile_length * stride
            to_u = shift(to_u, -tile_length, step_u)
            to_x = shift(to_x, -tile_length - chunk, step_x)

        if stage == REDUCE_SPANS:
            if inside and ty == 0:
                span_decay[y * B * D * H + col] = pack(span[0], span[last], real, real_word)
                span_offset[y * B * D * H + col] = pack(grad_carry[0], grad_carry[last], real, real_word)
        else:
            if inside and padding in (LENGTHS, PACKED):
                rest = _count_rest(padding, begin, steps, L, b, B)
                for i in range(y * chunks + ty, rest, spans * chunks):
                    position = begin + (steps + i) * abs(stride)
                    for k in range(parts):
                        grad_u[((position * D + d) * parts + k) * H + unit] = word(0)
                    if skip_kind == SKIP_INPUT:
                        grad_x[(position * D + d) * H + unit] = word(0)
            if chunks > 1:
                cuda.syncthreads()
                decays[uint64(tx) + uint64(ty * width)] = pack(sum_f[0], sum_f[last], real, real_word)
                offsets[uint64(tx) + uint64(ty * width)] = pack(sum_r[0], sum_r[last], real, real_word)
                cuda.syncthreads()
                for j in range(lanes):
                    sum_f[j], sum_r[j] = zero, zero
                    for i in range(chunks):
                        sum_f[j] += unpack(decays[uint64(tx) + uint64(i * width)], j, real)
                        sum_r[j] += unpack(offsets[uint64(tx) + uint64(i * width)], j, real)
            if inside and ty == 0:
                if y == 0:
                    grad_c_0[col] = pack(grad_carry[0], grad_carry[last], real, real_word)
                at = (y * B * D + row) * 2 * H + unit
                sum_bias[at] = pack(sum_f[0], sum_f[last], real, real_word)
                sum_bias[at + H] = pack(sum_r[0], sum_r[last], real, real_word)
                if version == 2:
                    sum_weight_c[at] = pack(sum_weight_f[0], sum_weight_f[last], real, real_word)
                    sum_weight_c[at + H] = pack(sum_weight_r[0], sum_weight_r[last], real, real_word)

    return backward


def words(storage: Storage, lanes: int) -> tuple[Any, Any]:
    """The types of the words that hold numbers of u and of states."""
    return WORDS[storage.number.bitwidth * lanes], WORDS[storage.real.bitwidth * lanes]


def signatures(options: Options, storage: Storage, tile: Tile) -> tuple[Any, Any]:
    """The types of the kernels' arguments, forward and backward. An absent array is a null pointer."""
    array, states = (types.CPointer(word) for word in words(storage, tile.lanes))
    valid = types.CPointer(uint8 if options.padding == MASK else int64)
    numbers = storage.real, *[int64] * 5
    return (
        types.void(array, array, *[states] * 4, valid, array, *[states] * 4, *numbers),
        types.void(array, array, *[states] * 3, valid, states, array, states, array, array, *[states] * 5, *numbers),
    )


# What follows was measured on an H200 (benchmarks/results). Blocks are counted for its 132 multiprocessors.
_WANTED_COLUMNS = 2**16  # chunks times columns
_MOST_CHUNKS = 16
_FEW_BYTES = 4096  # of the columns in a step of u: backward gets as many threads and steps as forward
_SPLIT_BYTES, _SPLIT_STEPS = 2048, 1024  # so few, and so many, are split into spans
_ROW, _LONG = 128, 8192  # bytes that a block should read at once, steps
_FEWEST_BLOCKS, _WANTED_BLOCKS, _MOST_SPANS = 128, 528, 64


def choose_tile(backward: bool, options: Options, storage: Storage, L: int, columns: int, lanes: int) -> Tile:
    """More chunks where there are few columns, so that there is work for the whole GPU, but none without a step.

    Forward keeps a state wherever one of backward's tiles starts, which may be shorter than its own.
    """
    width, chunks, steps = _choose_shape(backward, options, storage, L, columns, lanes)
    if backward:
        return Tile(width, chunks, steps, lanes)
    _, chunks_of_backward, steps_of_backward = _choose_shape(True, options, storage, L, columns, lanes)
    return Tile(width, chunks, steps, lanes, chunks * steps // (chunks_of_backward * steps_of_backward))


def _choose_shape(
    backward: bool, options: Options, storage: Storage, L: int, columns: int, lanes: int
) -> tuple[int, int, int]:
    """Columns, chunks and steps. In backward, chunks times steps must not depend on the lanes."""
    size = storage.number.bitwidth // 8
    threads = 256 if size == 2 and lanes == 2 and not backward else 128
    chunks, steps, most = 1, STEPS_PER_STATE, _MOST_CHUNKS
    is_split = _is_split(options, storage, L, columns)
    if options.version == 1:
        if backward and columns * size > _FEW_BYTES:
            # It keeps more in registers: half as many steps or, of 16 bits, a block of half as many threads.
            most, steps = (most // 2, steps) if size == 2 else (most, steps // 2)
        if is_split:
            most = _MOST_CHUNKS // 2
        wanted = int(2 ** round(math.log2(_WANTED_COLUMNS / max(1, columns))))
        longest = 1 << max(3, (L - 1).bit_length())  # the least power of two that holds the sequence, or 8
        chunks = max(STEPS_PER_STATE // steps, min(wanted, most, longest // steps))
    if is_split:
        return 16, chunks, steps
    width = max(8, threads // chunks)
    # Narrow blocks if there would be too few, but not below 8 words, in version 2 a warp.
    while width > (8 if chunks > 1 else 32) and -(-columns // (width * lanes)) < _FEWEST_BLOCKS:
        width //= 2
    # What a block reads at once, with two lanes. Neighbouring blocks do not stay at the same step, so memory serves
    # each on its own. Backward loses less by that than by fewer threads, unless they have long to drift apart.
    # Of so many columns, the loop above has not halved a width, with one lane or with two.
    is_narrow = width * 2 * size < _ROW <= columns * size // _FEWEST_BLOCKS
    is_long = L >= _LONG and options.padding != PACKED  # where L counts the steps of all rows
    if is_narrow and (is_long if backward else lanes == 2):
        width *= 2
        chunks, steps = (chunks // 2, steps) if backward and size == 4 else (chunks, steps // 2)
    return width, chunks, steps


def _is_split(options: Options, storage: Storage, L: int, columns: int) -> bool:
    """Whether there are too few columns for the GPU, and steps enough to share them out between blocks."""
    is_small = columns * storage.number.bitwidth // 8 <= _SPLIT_BYTES
    return options.version == 1 and options.padding != PACKED and is_small and L >= _SPLIT_STEPS


def _choose_spans(
    backward: bool, options: Options, storage: Storage, tile: Tile, L: int, columns: int
) -> tuple[int, int]:
    """How many spans the time is cut into, and the tiles of each."""
    tiles = max(1, -(-L // (tile.chunks * tile.steps)))
    if not _is_split(options, storage, L, columns):
        return 1, tiles
    blocks = -(-columns // (tile.columns * tile.lanes))
    wanted = _WANTED_BLOCKS // 2 if backward else _WANTED_BLOCKS  # a GPU holds half as many of them at once
    span_tiles = -(-tiles // max(1, min(_MOST_SPANS, wanted // blocks)))
    return -(-tiles // span_tiles), span_tiles


class _Plan(NamedTuple):
    """How a pass is launched."""

    kernels: tuple[cuda_launch.Kernel, ...]  # one, or two if the time is cut into spans
    blocks: tuple[int, int]
    block: tuple[int, int]
    tile: Tile
    spans: int
    span_tiles: int


@functools.lru_cache(4096)
def _plan(
    make_kernel: Callable[..., Any],
    options: Options,
    dtype: torch.dtype,
    steps: int,
    B: int,
    D: int,
    H: int,
    lanes: int,
) -> _Plan:
    storage, columns = STORAGE[dtype], B * D * H
    of_a_step = columns // (B if options.padding == PACKED and B else 1) * options.parts
    for count, what in ((steps, "steps"), (columns, "states"), (of_a_step, "numbers of u in a step")):
        if count >= 2**31:
            raise ValueError(f"the CUDA kernels take at most 2^31 - 1 {what}, got {count}")
    tile = choose_tile(make_kernel is backward_kernel, options, storage, steps, columns, lanes)
    spans, span_tiles = _choose_spans(make_kernel is backward_kernel, options, storage, tile, steps, columns)
    kernels = tuple(
        _kernel(make_kernel, options, storage, tile, stage)
        for stage in ((WHOLE,) if spans == 1 else (REDUCE_SPANS, SPANS))
    )
    blocks = -(-columns // (tile.columns * tile.lanes))
    return _Plan(kernels, (blocks, spans), (tile.columns, tile.chunks), tile, spans, span_tiles)


@functools.cache
def _kernel(
    make_kernel: Callable[..., Any], options: Options, storage: Storage, tile: Tile, stage: int
) -> cuda_launch.Kernel:
    signature = signatures(options, storage, tile)[make_kernel is backward_kernel]
    bounds = functools.partial(launch_bounds, make_kernel, options, storage, tile)
    what = options, storage, tile, stage
    return cuda_launch.Kernel(make_kernel(options, storage, tile, stage), signature, bounds, what)


def launch_bounds(
    make_kernel: Callable[..., Any], options: Options, storage: Storage, tile: Tile, capability: tuple[int, int]
) -> tuple[int, int]:
    """Threads of a block, and for how many blocks the registers of a multiprocessor must do."""
    threads, backward = tile.columns * tile.chunks, make_kernel is backward_kernel
    has_few_numbers = storage.number.bitwidth == 16 and tile.steps < STEPS_PER_STATE
    needs_many = options.version == 2 or (tile.lanes == 2 and not has_few_numbers)
    if storage.real == float64 or (backward and needs_many):
        resident = 256
    else:
        resident = 384 if backward and tile.steps == STEPS_PER_STATE else 512
    if capability < (8, 0):
        resident = 256  # what is copied goes through registers there, and memory for more blocks is not there either
    if backward and capability >= (10, 0):  # for which the compiler takes more registers
        resident //= 2
    return threads, max(1, resident // threads)


def _count_lanes(options: Options, columns: int, H: int, u: Tensor, *arrays: Tensor | None) -> int:
    """How many neighbouring numbers are loaded at once: two, if they can be everywhere.

    That is half as many loads, and as much of the address arithmetic. Few columns of 32 bits give every thread one.
    """
    if u.itemsize > 4 or options.version != 1 or H % 2 or (u.itemsize == 4 and columns * 4 <= _FEW_BYTES):
        return 1
    addresses = u.data_ptr()
    for a in arrays:
        if a is not None:
            addresses |= a.data_ptr()
    return 2 if addresses % 8 == 0 else 1


def forward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """h, c_n and, with `save_c`, what backward needs of c: states at the starts of its tiles."""
    D, H = u.shape[-3], u.shape[-1]
    return _forward(options, u, x, bias, weight_c, c_0, mask_c, valid, scale_x, B, D, H, (*u.shape[:-3], D * H))


def layer_forward(
    options: Options, v: Tensor, weight: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None,
    c_0: Tensor | None, mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int, D: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h and c_n of a layer without gradients."""
    H = bias.shape[-1]
    u = F.linear(v, weight)
    h_shape = (*v.shape[:-1], D * H)
    h, c_n, _ = _forward(options, u, x, bias, weight_c, c_0, mask_c, valid, scale_x, B, D, H, h_shape)
    return h, c_n


def _forward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, scale_x: float, B: int, D: int, H: int, h_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`forward` of u in any shape."""
    steps = h_shape[0]  # L, and of sequences end to end all there are
    h, c_n = u.new_empty(h_shape), bias.new_empty(B, D * H)
    lanes = _count_lanes(options, B * D * H, H, u, x, bias, weight_c, c_0, mask_c)
    plan = _plan(forward_kernel, options, u.dtype, steps, B, D, H, lanes)
    saved = None
    if options.save_c:
        # Room for the closest states that are chosen: torch.compile has to know the shape without the plan.
        distance = plan.tile.chunks * plan.tile.steps // plan.tile.states
        saved = bias.new_empty(count_saved(options.padding, steps, B, min(distance, STEPS_PER_STATE)), D * H)
    if B * D * H:
        decay, offset = (bias.new_empty(plan.spans, B, D * H) if plan.spans > 1 else None for _ in range(2))
        arrays = u, x, bias, weight_c, c_0, mask_c, valid, h, c_n, saved, decay, offset
        numbers = steps, B, D, H // plan.tile.lanes, plan.span_tiles
        for kernel in plan.kernels:
            cuda_launch.launch(kernel, u.device, plan.blocks, plan.block, arrays, scale_x, numbers)
    return h, c_n, saved


def backward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, L: int, B: int, saved: Tensor, grad_h: Tensor, grad_c_n: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of u, x, bias, weight_c and c_0."""
    D, H = u.shape[-3], u.shape[-1]
    steps = len(u)  # L, and of sequences end to end all there are
    plan = _plan(
        backward_kernel, options._replace(has_c_0=False, save_c=True), u.dtype, steps, B, D, H,
        _count_lanes(options, B * D * H, H, u, x, bias, weight_c, mask_c, saved, grad_h, grad_c_n),
    )  # fmt: skip
    grad_u, grad_x = torch.empty_like(u), None if x is None else torch.empty_like(x)
    grad_c_0, sum_bias = torch.empty_like(grad_c_n), bias.new_empty(plan.spans * B, D, 2, H)
    sum_weight_c = None if weight_c is None else torch.empty_like(sum_bias)
    if grad_c_0.numel():
        decay, offset = (bias.new_empty(plan.spans, B, D * H) if plan.spans > 1 else None for _ in range(2))
        arrays = (
            u, x, bias, weight_c, mask_c, valid, saved, grad_h, grad_c_n,
            grad_u, grad_x, grad_c_0, sum_bias, sum_weight_c, decay, offset,
        )  # fmt: skip
        numbers = steps, B, D, H // plan.tile.lanes, plan.span_tiles
        for kernel in plan.kernels:
            cuda_launch.launch(kernel, u.device, plan.blocks, plan.block, arrays, scale_x, numbers)
    return grad_u, grad_x, sum_bias.sum(0), None if sum_weight_c is None else sum_weight_c.sum(0), grad_c_0
