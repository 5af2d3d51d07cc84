"""The CUDA kernels, forward and backward, and the host functions that allocate their results and launch them.

A column is one (batch row, direction, unit): an independent recurrence. A block owns `columns` neighbouring columns and
goes through time in tiles of `chunks * steps` steps; thread (tx, ty) owns column tx and chunk ty of each tile, and
loads its `steps` steps into registers before it computes. In version 1 each state is linear in the one before, so a
thread reduces its chunk to c -> decay c + offset; these pairs are exchanged through shared memory, and every thread
folds them, in the same order, to learn the state at the start of its chunk. Version 2 has one chunk.

The state is kept at the start of every tile only; backward computes the states inside again. Gradients of parameters
are summed for each batch row in a fixed order, so results repeat their bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numba import cuda, float32, float64, int64, types, uint8
from torch import Tensor

from . import cuda_launch
from .cuda_intrinsics import device_function
from .recurrence import (
    LENGTHS,
    MASK,
    PACKED,
    SKIP_INPUT,
    SKIP_PROJECTED,
    Options,
    backward_step,
    gate,
    next_state,
    output,
    state_grad,
)


class Tile(NamedTuple):
    """The shape of a block's work: `columns * chunks` threads, `steps` steps of time in each thread's registers."""

    columns: int
    chunks: int
    steps: int


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
def _longest_row(valid, padding, first_col, last_col, L, B, D, H):
    """The most steps that a row of the block has: all its threads go through time together."""
    longest = int64(0)
    for b in range(first_col // (D * H), last_col // (D * H) + 1):
        longest = max(longest, _row_steps(valid, padding, b, L, B)[2])
    return longest


@device_function
def _position(s, d, begin, stride, steps, positions):
    """Where the s-th step that direction d takes stands among all steps. Beyond the last: some step that exists."""
    if d == 1:
        return min(begin + max(steps - 1 - s, int64(0)) * stride, positions - 1)
    return min(begin + max(min(s, steps - 1), int64(0)) * stride, positions - 1)


@device_function
def _count_rest(padding, begin, steps, L, b, B):
    """Steps behind the last of batch row b that no row takes: they are padding."""
    if padding == LENGTHS:
        return L - steps
    return L - begin - steps if b == B - 1 else int64(0)


@device_function
def _saved_at(tile_index, begin, padding, tile_length, b, B):
    """Where the state at the start of a tile is kept: distinct for all tiles of all rows."""
    if padding == PACKED:
        return begin // tile_length + b + tile_index
    return tile_index * B + b


@device_function
def _load_chunk(
    candidate, forget, reset, skip, u, x, mask_pad, scale_x, first, chunk, row, unit, begin, stride, steps, positions,
    D, H, skip_kind, padding,
):  # fmt: skip
    """Read a thread's steps into its registers; returns one bit for each that is padding or lies beyond the end.

    Such steps are read too, so that no load waits for another, and then ignored.
    """
    d = row % D
    parts = 4 if skip_kind == SKIP_PROJECTED else 3
    padded = int64(0)
    for k in range(chunk):
        position = _position(first + k, d, begin, stride, steps, positions)
        at = (position * D + d) * parts * H + unit
        candidate[k] = u[at]
        forget[k] = u[at + H]
        reset[k] = u[at + 2 * H]
        if skip_kind == SKIP_INPUT:
            skip[k] = scale_x * x[(position * D + d) * H + unit]
        elif skip_kind == SKIP_PROJECTED:
            skip[k] = u[at + 3 * H]
        else:
            skip[k] = type(scale_x)(0)
        if first + k >= steps or (padding == MASK and mask_pad[position] != 0):
            padded |= int64(1) << k
    return padded


@device_function
def _linear_gates(candidate, forget, padded, bias_f, chunk):
    """Version 1: the forget gates of a thread's steps, which see no state. A step of padding becomes c -> 1 c + 0."""
    zero = type(bias_f)(0)
    for k in range(chunk):
        if (padded >> k) & 1:
            forget[k] = type(bias_f)(1)
            candidate[k] = zero
        else:
            forget[k] = gate(forget[k], bias_f, zero, zero, 1)


@device_function
def _compose(candidate, forget, chunk, one):
    """A thread's steps as one: the decay and offset of c -> decay c + offset."""
    decay, offset = one, one - one
    for k in range(chunk):
        decay = decay * forget[k]
        offset = next_state(forget[k], candidate[k], offset)
    return decay, offset


@functools.cache
def forward_kernel(options: Options, real: Any, tile: Tile) -> Callable[..., None]:
    """One launch writes h, c_n and, with `save_c`, the state at the start of every tile."""
    version, nonlinearity, placement, skip_kind, padding, has_c_0, has_mask_c, save_c = options
    width, chunks, chunk = tile
    assert version == 1 or chunks == 1
    uneven = padding in (LENGTHS, PACKED)  # rows have different numbers of steps
    tile_length, exchanged = chunks * chunk, 2 * chunks * width

    def forward(u, x, bias, weight_c, c_0, mask_c, valid, scale_x, L, B, D, H, h, c_n, saved):
        decays = cuda.shared.array(exchanged, real)
        offsets = cuda.shared.array(exchanged, real)
        candidate = cuda.local.array(chunk, real)
        forget = cuda.local.array(chunk, real)
        reset = cuda.local.array(chunk, real)
        skip = cuda.local.array(chunk, real)
        one, zero = real(1), real(0)

        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        columns = B * D * H
        first_col = int64(cuda.blockIdx.x) * width
        inside = first_col + tx < columns
        col = min(first_col + tx, columns - 1)  # a thread beyond the last column reads that column and writes nothing
        row, unit = col // H, col % H
        b, d = row // D, row % D
        begin, stride, steps = _row_steps(valid, padding, b, L, B)
        positions = L if padding == PACKED else L * B
        gate_f = d * 2 * H + unit
        gate_r = gate_f + H
        bias_f, bias_r = bias[gate_f], bias[gate_r]
        weight_f = weight_c[gate_f] if version == 2 else zero
        weight_r = weight_c[gate_r] if version == 2 else zero
        mask = mask_c[col] if has_mask_c else one
        carry = c_0[col] if has_c_0 else zero
        buffer = int64(0)

        longest = L
        if uneven:
            longest = _longest_row(valid, padding, first_col, min(first_col + width, columns) - 1, L, B, D, H)
        for start in range(int64(0), longest, int64(tile_length)):
            if save_c and inside and ty == 0 and start < steps:
                saved[_saved_at(start // tile_length, begin, padding, tile_length, b, B) * D * H + d * H + unit] = carry
            first = start + ty * chunk
            padded = _load_chunk(
                candidate, forget, reset, skip, u, x, valid, scale_x, first, chunk, row, unit, begin, stride, steps,
                positions, D, H, skip_kind, padding,
            )  # fmt: skip
            if version == 1:
                _linear_gates(candidate, forget, padded, bias_f, chunk)
            c = carry
            if chunks > 1:
                decay, offset = _compose(candidate, forget, chunk, one)
                decays[(buffer + ty) * width + tx] = decay
                offsets[(buffer + ty) * width + tx] = offset
                cuda.syncthreads()
                for i in range(chunks):
                    if i == ty:
                        c = carry
                    at = (buffer + i) * width + tx
                    carry = decays[at] * carry + offsets[at]
                buffer = chunks - buffer  # the next tile writes where nobody reads any more: one barrier is enough
            for k in range(chunk):
                is_padding = (padded >> k) & 1
                f = gate(forget[k], bias_f, weight_f, c, version) if version == 2 else forget[k]
                r = gate(reset[k], bias_r, weight_r, c, version)
                if not is_padding:
                    c = next_state(f, candidate[k], c)
                if inside and first + k < steps:
                    position = _position(first + k, d, begin, stride, steps, positions)
                    h_k = output(c, r, skip[k], mask, nonlinearity, placement)
                    h[(position * D + d) * H + unit] = zero if is_padding else h_k
            if chunks == 1:
                carry = c
        if inside and ty == 0:
            c_n[col] = carry
        if inside and uneven:
            for i in range(ty, _count_rest(padding, begin, steps, L, b, B), int64(chunks)):
                h[((begin + (steps + i) * stride) * D + d) * H + unit] = zero

    return forward


@functools.cache
def backward_kernel(options: Options, real: Any, tile: Tile) -> Callable[..., None]:
    """One launch writes grad_u, grad_x, grad_c_0 and each row's sums over time for the gradients of the parameters."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, _ = options
    width, chunks, chunk = tile
    assert version == 1 or chunks == 1
    uneven = padding in (LENGTHS, PACKED)  # rows have different numbers of steps
    tile_length, threads, exchanged = chunks * chunk, chunks * width, 2 * chunks * width
    parts = options.parts

    def backward(
        u, x, bias, weight_c, mask_c, valid, scale_x, L, B, D, H, saved, grad_h, grad_c_n,
        grad_u, grad_x, grad_c_0, sum_bias, sum_weight_c,
    ):  # fmt: skip
        decays = cuda.shared.array(exchanged, real)
        offsets = cuda.shared.array(exchanged, real)
        grad_offsets = cuda.shared.array(threads, real)
        candidate = cuda.local.array(chunk, real)
        forget = cuda.local.array(chunk, real)
        reset = cuda.local.array(chunk, real)
        skip = cuda.local.array(chunk, real)
        grad_out = cuda.local.array(chunk, real)
        states = cuda.local.array(chunk, real)
        one, zero = real(1), real(0)

        tx, ty = int64(cuda.threadIdx.x), int64(cuda.threadIdx.y)
        columns = B * D * H
        first_col = int64(cuda.blockIdx.x) * width
        inside = first_col + tx < columns
        col = min(first_col + tx, columns - 1)
        row, unit = col // H, col % H
        b, d = row // D, row % D
        begin, stride, steps = _row_steps(valid, padding, b, L, B)
        positions = L if padding == PACKED else L * B
        gate_f = d * 2 * H + unit
        gate_r = gate_f + H
        bias_f, bias_r = bias[gate_f], bias[gate_r]
        weight_f = weight_c[gate_f] if version == 2 else zero
        weight_r = weight_c[gate_r] if version == 2 else zero
        mask = mask_c[col] if has_mask_c else one
        grad_carry = grad_c_n[col]
        sum_f, sum_r, sum_weight_f, sum_weight_r = zero, zero, zero, zero
        buffer = int64(0)

        longest = L
        if uneven:
            longest = _longest_row(valid, padding, first_col, min(first_col + width, columns) - 1, L, B, D, H)
        for tile_index in range((longest - 1) // tile_length, int64(-1), int64(-1)):
            first = tile_index * tile_length + ty * chunk
            padded = _load_chunk(
                candidate, forget, reset, skip, u, x, valid, scale_x, first, chunk, row, unit, begin, stride, steps,
                positions, D, H, skip_kind, padding,
            )  # fmt: skip
            for k in range(chunk):
                position = _position(first + k, d, begin, stride, steps, positions)
                grad_out[k] = grad_h[(position * D + d) * H + unit]
            if version == 1:
                _linear_gates(candidate, forget, padded, bias_f, chunk)

            # The states inside the tile, as in forward.
            carry = zero
            if tile_index * tile_length < steps:
                carry = saved[_saved_at(tile_index, begin, padding, tile_length, b, B) * D * H + d * H + unit]
            c_start = carry
            if chunks > 1:
                decay, offset = _compose(candidate, forget, chunk, one)
                decays[(buffer + ty) * width + tx] = decay
                offsets[(buffer + ty) * width + tx] = offset
                cuda.syncthreads()
                for i in range(chunks):
                    if i == ty:
                        c_start = carry
                    at = (buffer + i) * width + tx
                    carry = decays[at] * carry + offsets[at]
            c = c_start
            for k in range(chunk):
                if version == 2:
                    forget[k] = gate(forget[k], bias_f, weight_f, c, version)
                reset[k] = gate(reset[k], bias_r, weight_r, c, version)
                if not (padded >> k) & 1:
                    c = next_state(forget[k], candidate[k], c)
                states[k] = c

            # dL/dc in front of each step is linear in dL/dc behind it: the same scan, from the end to the start.
            grad_c = grad_carry
            if chunks > 1:
                offset = zero
                for k in range(chunk - 1, -1, -1):
                    through_h = state_grad(grad_out[k], states[k], reset[k], mask, nonlinearity)
                    offset = forget[k] * (offset + (zero if (padded >> k) & 1 else through_h))
                grad_offsets[ty * width + tx] = offset
                cuda.syncthreads()
                for i in range(chunks - 1, -1, -1):
                    if i == ty:
                        grad_c = grad_carry
                    grad_carry = decays[(buffer + i) * width + tx] * grad_carry + grad_offsets[i * width + tx]
                buffer = chunks - buffer
            for k in range(chunk - 1, -1, -1):
                c_prev = states[k - 1] if k > 0 else c_start
                g_candidate, g_forget, g_reset, g_skip, g_c = backward_step(
                    grad_out[k], grad_c, states[k], c_prev, forget[k], reset[k], candidate[k], skip[k], mask,
                    weight_f, weight_r, version, nonlinearity, placement,
                )  # fmt: skip
                if (padded >> k) & 1:
                    g_candidate, g_forget, g_reset, g_skip, g_c = zero, zero, zero, zero, grad_c
                grad_c = g_c
                sum_f += g_forget
                sum_r += g_reset
                if version == 2:
                    sum_weight_f += g_forget * c_prev
                    sum_weight_r += g_reset * c_prev
                if inside and first + k < steps:
                    position = _position(first + k, d, begin, stride, steps, positions)
                    at = (position * D + d) * parts * H + unit
                    grad_u[at] = g_candidate
                    grad_u[at + H] = g_forget
                    grad_u[at + 2 * H] = g_reset
                    if skip_kind == SKIP_INPUT:
                        grad_x[(position * D + d) * H + unit] = scale_x * g_skip
                    elif skip_kind == SKIP_PROJECTED:
                        grad_u[at + 3 * H] = g_skip
            if chunks == 1:
                grad_carry = grad_c

        if inside and uneven:
            for i in range(ty, _count_rest(padding, begin, steps, L, b, B), int64(chunks)):
                position = begin + (steps + i) * stride
                for k in range(parts):
                    grad_u[((position * D + d) * parts + k) * H + unit] = zero
                if skip_kind == SKIP_INPUT:
                    grad_x[(position * D + d) * H + unit] = zero
        if chunks > 1:
            cuda.syncthreads()
            decays[ty * width + tx] = sum_f
            offsets[ty * width + tx] = sum_r
            cuda.syncthreads()
            sum_f, sum_r = zero, zero
            for i in range(chunks):
                sum_f += decays[i * width + tx]
                sum_r += offsets[i * width + tx]
        if inside and ty == 0:
            grad_c_0[col] = grad_carry
            sum_bias[row * 2 * H + unit] = sum_f
            sum_bias[row * 2 * H + H + unit] = sum_r
            if version == 2:
                sum_weight_c[row * 2 * H + unit] = sum_weight_f
                sum_weight_c[row * 2 * H + H + unit] = sum_weight_r

    return backward


def signatures(options: Options, real: Any) -> tuple[Any, Any]:
    """The types of the kernels' arguments, forward and backward. An absent array is a null pointer."""
    array, valid = types.CPointer(real), types.CPointer(uint8 if options.padding == MASK else int64)
    sizes = [int64] * 4
    return (
        types.void(*[array] * 6, valid, real, *sizes, *[array] * 3),
        types.void(*[array] * 5, valid, real, *sizes, *[array] * 8),
    )


def choose_tile(options: Options, L: int, columns: int) -> Tile:
    """More chunks where there are few columns, so that there is work for the whole GPU, but none without a step.

    256 threads at most: with so few, a thread may use all the registers there are.
    """
    steps, chunks = 8, 1
    while options.version == 1 and chunks < 8 and columns * chunks < _WANTED_THREADS and chunks * steps < L:
        chunks *= 2
    return Tile(128 if chunks == 1 else 32, chunks, steps)


_WANTED_THREADS = 132 * 512  # a quarter of what an H100 or H200 can hold
_REAL = {torch.float32: float32, torch.float64: float64}


def _count_saved(padding: int, tile_length: int, L: int, B: int) -> int:
    """An upper bound of the tiles of all rows; see _saved_at."""
    return L // tile_length + B if padding == PACKED else -(-L // tile_length) * B


def forward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """h, c_n and, with `save_c`, what backward needs of c: the states at the start of every tile."""
    D, H = u.shape[-3], u.shape[-1]
    columns, real = B * D * H, _REAL[u.dtype]
    tile, steps = choose_tile(options, L, columns), len(u)  # steps: L, and of sequences end to end all there are
    h, c_n = u.new_empty(*u.shape[:-3], D * H), u.new_empty(B, D * H)
    saved = None
    if options.save_c:
        saved = u.new_empty(_count_saved(options.padding, tile.chunks * tile.steps, steps, B), D * H)
    if columns:
        cuda_launch.launch(
            forward_kernel(options, real, tile), signatures(options, real)[0], u.device,
            -(-columns // tile.columns), (tile.columns, tile.chunks),
            u, x, bias, weight_c, c_0, mask_c, valid, scale_x, steps, B, D, H, h, c_n, saved,
        )  # fmt: skip
    return h, c_n, saved


def backward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, L: int, B: int, saved: Tensor, grad_h: Tensor, grad_c_n: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of u, x, bias, weight_c and c_0."""
    D, H = u.shape[-3], u.shape[-1]
    columns, real = B * D * H, _REAL[u.dtype]
    tile, steps = choose_tile(options, L, columns), len(u)  # steps: L, and of sequences end to end all there are
    grad_u, grad_x = torch.empty_like(u), None if x is None else torch.empty_like(x)
    grad_c_0, sum_bias = torch.empty_like(grad_c_n), u.new_empty(B, D, 2, H)
    sum_weight_c = None if weight_c is None else torch.empty_like(sum_bias)
    if columns:
        cuda_launch.launch(
            backward_kernel(options._replace(has_c_0=False, save_c=True), real, tile),
            signatures(options, real)[1], u.device,
            -(-columns // tile.columns), (tile.columns, tile.chunks),
            u, x, bias, weight_c, mask_c, valid, scale_x, steps, B, D, H, saved, grad_h, grad_c_n,
            grad_u, grad_x, grad_c_0, sum_bias, sum_weight_c,
        )  # fmt: skip
    return grad_u, grad_x, sum_bias.sum(0), None if sum_weight_c is None else sum_weight_c.sum(0), grad_c_0
