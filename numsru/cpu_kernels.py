"""The CPU kernels, forward and backward, and the host functions that allocate their results and run them.

A kernel goes through time; at each step it goes through the rows of its task (a row is one batch row in one
direction) and along the units of a row, in blocks that LLVM turns into vector instructions. No row depends on another,
so tasks may run on any thread in any order and the result has the same bits.

For backward the state is kept at every eighth step only; backward computes those between again.

A kernel's one argument is the address of 64-bit words, addresses and numbers, in the order in which `_run` packs
them. A launch of forward may cover a part of the time and one of two directions; the state stands in c_n, before and
after. One of backward takes all of both.
"""

import ctypes
import functools
import pathlib
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, types
from numba.core.registry import cpu_target
from torch import Tensor

from .compiling import compile_or_load
from .cpu_intrinsics import BFLOAT16, READ, fetch_add, inlined, load, prefer_wide_vectors, prefetch, store
from .products import product
from .recurrence import (
    LENGTHS,
    MASK,
    NO_PADDING,
    NONLINEARITIES,
    PACKED,
    PAPER,
    SKIP_INPUT,
    SKIP_PROJECTED,
    STEPS_PER_STATE,
    Options,
    backward_step,
    count_saved,
    gate,
    next_state,
    output,
)

# Alias scopes of what the kernels write, see cpu_intrinsics: each is a separate piece of memory.
C, H_OUT, SAVED, FORGET, STATES, GRAD_C, GRAD_CANDIDATE, GRAD_FORGET = range(1, 9)
GRAD_RESET, GRAD_SKIP, BIAS_F, BIAS_R, WEIGHT_F, WEIGHT_R = range(9, 15)

WIDTH = 16  # units of a block: one vector of float32, or two or four, as wide as the processor has them
TILE = STEPS_PER_STATE  # steps from one state that is kept to the next


@inlined
def _word(args, i):
    return load(args, i, np.int64, READ)


@inlined
def _next_task(args):
    """Take the next block of work: first row, row after the last, first unit, number of units. No rows: all is done."""
    task = fetch_add(args, 1)
    n_tasks, rows_per_task, units_per_task = _word(args, 1), _word(args, 2), _word(args, 3)
    rows, H = _word(args, 7) * _word(args, 11), _word(args, 9)
    if task >= n_tasks:
        return task, 0, 0, 0, 0
    row_blocks = (rows + rows_per_task - 1) // rows_per_task
    row, unit = task % row_blocks * rows_per_task, task // row_blocks * units_per_task
    return task, row, min(row + rows_per_task, rows), unit, min(units_per_task, H - unit)


@inlined
def _row_steps(valid, padding, b, L):
    """Where the sequence of batch row b begins, and its steps. Of padding, only that of a mask is among them."""
    if padding == LENGTHS:
        return 0, load(valid, b, np.int64, READ)
    if padding == PACKED:
        begin = load(valid, b, np.int64, READ)
        return begin, load(valid, b + 1, np.int64, READ) - begin
    return 0, L


@inlined
def _steps_of_launch(begin, steps, first, end):
    """From where to where a launch covers the steps of a row."""
    return min(max(first - begin, 0), steps), min(max(end - begin, 0), steps)


@inlined
def _position(padding, begin, t, b, B):
    """Where step t of batch row b stands among all steps of all rows."""
    return begin + t if padding == PACKED else t * B + b


@inlined
def _saved_at(padding, begin, tile, b, B):
    """Where the state at the start of a tile is kept: distinct for all tiles of all rows."""
    return begin // TILE + b + tile if padding == PACKED else tile * B + b


@inlined
def _put(address, j, value, dtype, scope, fresh):
    """Store, unless the element has been dealt with."""
    old = load(address, j, dtype, scope)
    store(address, j, value if fresh else old, dtype, scope)


@inlined
def _start_of_block(block, units):
    """The last block of a row ends with it, so that it is as long as all others; some of it has been dealt with."""
    return max(min(block * WIDTH, units - WIDTH), 0)


@inlined
def _fill(address, n, value, dtype, scope):
    for j in range(n):
        store(address, j, value, dtype, scope)


@inlined
def _copy(to, to_scope, source, source_scope, n, real):
    for j in range(n):
        store(to, j, load(source, j, real, source_scope), real, to_scope)


@inlined
def _skip_input(u, x, j, H, scale_x, storage, real, skip_kind):
    if skip_kind == SKIP_INPUT:
        return scale_x * load(x, j, storage, READ)
    if skip_kind == SKIP_PROJECTED:
        return load(u, 3 * H + j, storage, READ)
    return real(0)


@inlined
def _forward_unit(
    j, fresh, H, u, x, scale_x, bias, weight_c, mask_c, c, h, storage, real, version, nonlinearity, placement,
    skip_kind, has_mask_c,
):  # fmt: skip
    c_j = load(c, j, real, C)
    weight_f = load(weight_c, j, real, READ) if version == 2 else real(0)
    weight_r = load(weight_c, H + j, real, READ) if version == 2 else real(0)
    mask = load(mask_c, j, real, READ) if has_mask_c else real(1)
    skip = _skip_input(u, x, j, H, scale_x, storage, real, skip_kind)
    f = gate(load(u, H + j, storage, READ), load(bias, j, real, READ), weight_f, c_j, version)
    r = gate(load(u, 2 * H + j, storage, READ), load(bias, H + j, real, READ), weight_r, c_j, version)
    c_j = next_state(f, load(u, j, storage, READ), c_j)
    _put(c, j, c_j, real, C, fresh)
    _put(h, j, output(c_j, r, skip, mask, nonlinearity, placement), storage, H_OUT, fresh)


@functools.cache
def _forward_kernel(options: Options, storage: Any) -> Any:
    """Writes h and, with `save_c`, the state at the start of every tile; takes c_n from the first step to the last."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, save_c = options
    parts, real, size, stored = options.parts, _real(storage), _itemsize(_real(storage)), _itemsize(storage)

    def forward(args):
        prefer_wide_vectors()
        first, end, L, B, D, H = (
            _word(args, 4), _word(args, 5), _word(args, 6), _word(args, 7), _word(args, 8), _word(args, 9),
        )  # fmt: skip
        first_direction, directions = _word(args, 10), _word(args, 11)
        scale_x = real(load(args, 12, np.float64, READ))
        u, x, bias, weight_c, mask_c = (
            _word(args, 13), _word(args, 14), _word(args, 15), _word(args, 16), _word(args, 17),
        )  # fmt: skip
        valid, c_n, h, saved = _word(args, 18), _word(args, 19), _word(args, 20), _word(args, 21)
        while True:
            _, first_row, end_row, unit, units = _next_task(args)
            if first_row == end_row:
                return
            blocks = (units + WIDTH - 1) // WIDTH
            # Sequences end to end go through time one after the other, the rows of a batch together.
            together = 1 if padding == PACKED else end_row - first_row
            for group in range(first_row, end_row, together):
                longest = end - first
                if padding == PACKED:
                    begin, steps = _row_steps(valid, padding, group // directions, L)
                    low, high = _steps_of_launch(begin, steps, first, end)
                    longest = high - low
                for s in range(longest):
                    for row in range(group, group + together):
                        b, d = row // directions, first_direction + row % directions
                        begin, steps = _row_steps(valid, padding, b, L)
                        low, high = _steps_of_launch(begin, steps, first, end)
                        if s >= high - low:
                            if padding == LENGTHS:
                                at = ((_position(padding, begin, first + s, b, B) * D + d) * H + unit) * stored
                                _fill(h + at, units, real(0), storage, H_OUT)
                            continue
                        k = steps - high + s if d == 1 else low + s  # steps that this direction took before
                        position = _position(padding, begin, steps - 1 - k if d == 1 else k, b, B)
                        at = ((position * D + d) * H + unit) * stored
                        c = c_n + ((b * D + d) * H + unit) * size
                        if save_c and k % TILE == 0:
                            tile = _saved_at(padding, begin, k // TILE, b, B)
                            _copy(saved + ((tile * D + d) * H + unit) * size, SAVED, c, C, units, real)
                        if padding == MASK and load(valid, position, np.uint8, READ) != 0:
                            _fill(h + at, units, real(0), storage, H_OUT)
                            continue
                        u_row = u + ((position * directions + d - first_direction) * parts * H + unit) * stored
                        gates, state = (d * 2 * H + unit) * size, ((b * D + d) * H + unit) * size
                        for block in range(blocks):
                            j = _start_of_block(block, units)
                            # The processor does not foresee that a row is followed by the next row's other parts.
                            for part in range(parts):
                                prefetch(u_row + (directions * parts * H + part * H + j) * stored)
                            if skip_kind == SKIP_INPUT:
                                prefetch(x + at + (D * H + j) * stored)
                            if j + WIDTH <= units and j == block * WIDTH:
                                for i in range(WIDTH):
                                    _forward_unit(
                                        j + i, True, H, u_row, x + at, scale_x, bias + gates, weight_c + gates,
                                        mask_c + state, c, h + at, storage, real, version, nonlinearity, placement,
                                        skip_kind, has_mask_c,
                                    )  # fmt: skip
                            else:
                                for i in range(min(units, WIDTH)):
                                    _forward_unit(
                                        j + i, j + i >= block * WIDTH, H, u_row, x + at, scale_x, bias + gates,
                                        weight_c + gates, mask_c + state, c, h + at, storage, real, version,
                                        nonlinearity, placement, skip_kind, has_mask_c,
                                    )  # fmt: skip

    return _compile(forward, options, storage)


@inlined
def _state_unit(j, fresh, H, u, bias, weight_c, c, forget, state, storage, real, version):
    """One step of the state, kept together with its forget gate."""
    c_j = load(c, j, real, C)
    weight_f = load(weight_c, j, real, READ) if version == 2 else real(0)
    f = gate(load(u, H + j, storage, READ), load(bias, j, real, READ), weight_f, c_j, version)
    c_j = next_state(f, load(u, j, storage, READ), c_j)
    _put(c, j, c_j, real, C, fresh)
    _put(forget, j, f, real, FORGET, fresh)
    _put(state, j, c_j, real, STATES, fresh)


@inlined
def _backward_unit(
    j, fresh, H, u, x, scale_x, bias, weight_c, mask_c, forget, state, c_prev, grad_h, grad_c, grad_u,
    grad_x, sum_bias, sum_weight_c, storage, real, version, nonlinearity, placement, skip_kind, has_mask_c,
):  # fmt: skip
    c_j = load(c_prev, j, real, STATES)
    weight_f = load(weight_c, j, real, READ) if version == 2 else real(0)
    weight_r = load(weight_c, H + j, real, READ) if version == 2 else real(0)
    mask = load(mask_c, j, real, READ) if has_mask_c else real(1)
    skip = _skip_input(u, x, j, H, scale_x, storage, real, skip_kind)
    r = gate(load(u, 2 * H + j, storage, READ), load(bias, H + j, real, READ), weight_r, c_j, version)
    grad_candidate, grad_forget, grad_reset, grad_skip, grad_c_prev = backward_step(
        load(grad_h, j, storage, READ), load(grad_c, j, real, GRAD_C), load(state, j, real, STATES), c_j,
        load(forget, j, real, FORGET), r, load(u, j, storage, READ), skip, mask, weight_f, weight_r, version,
        nonlinearity, placement,
    )  # fmt: skip
    _put(grad_c, j, grad_c_prev, real, GRAD_C, fresh)
    _put(grad_u, j, grad_candidate, storage, GRAD_CANDIDATE, fresh)
    _put(grad_u, H + j, grad_forget, storage, GRAD_FORGET, fresh)
    _put(grad_u, 2 * H + j, grad_reset, storage, GRAD_RESET, fresh)
    if skip_kind == SKIP_INPUT:
        _put(grad_x, j, scale_x * grad_skip, storage, GRAD_SKIP, fresh)
    elif skip_kind == SKIP_PROJECTED:
        _put(grad_u, 3 * H + j, grad_skip, storage, GRAD_SKIP, fresh)
    _put(sum_bias, j, load(sum_bias, j, real, BIAS_F) + grad_forget, real, BIAS_F, fresh)
    _put(sum_bias, H + j, load(sum_bias, H + j, real, BIAS_R) + grad_reset, real, BIAS_R, fresh)
    if version == 2:
        sum_f, sum_r = load(sum_weight_c, j, real, WEIGHT_F), load(sum_weight_c, H + j, real, WEIGHT_R)
        _put(sum_weight_c, j, sum_f + grad_forget * c_j, real, WEIGHT_F, fresh)
        _put(sum_weight_c, H + j, sum_r + grad_reset * c_j, real, WEIGHT_R, fresh)


@functools.cache
def _backward_kernel(options: Options, storage: Any) -> Any:
    """Writes grad_u and grad_x, takes grad_c from the last step to the first, adds up the gates' sums of each row."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, _ = options
    parts, real, size, stored = options.parts, _real(storage), _itemsize(_real(storage)), _itemsize(storage)

    def backward(args):
        prefer_wide_vectors()
        L, B, D, H = _word(args, 6), _word(args, 7), _word(args, 8), _word(args, 9)
        scale_x = real(load(args, 12, np.float64, READ))
        u, x, bias, weight_c, mask_c = (
            _word(args, 13), _word(args, 14), _word(args, 15), _word(args, 16), _word(args, 17),
        )  # fmt: skip
        valid, saved, grad_h, grad_c_n = _word(args, 18), _word(args, 19), _word(args, 20), _word(args, 21)
        grad_u, grad_x, sums_bias, sums_weight_c = _word(args, 22), _word(args, 23), _word(args, 24), _word(args, 25)
        while True:
            task, first_row, end_row, unit, units = _next_task(args)
            if first_row == end_row:
                return
            blocks = (units + WIDTH - 1) // WIDTH
            # Of one tile of one row: forget gates, states, and the state while it is computed.
            forgets = _word(args, 26) + task * (2 * TILE + 1) * H * size
            states, c = forgets + TILE * H * size, forgets + 2 * TILE * H * size
            together = 1 if padding == PACKED else end_row - first_row
            for group in range(first_row, end_row, together):
                longest = _row_steps(valid, padding, group // D, L)[1] if padding == PACKED else L
                for back in range((longest + TILE - 1) // TILE):
                    for row in range(group, group + together):
                        b, d = row // D, row % D
                        begin, steps = _row_steps(valid, padding, b, L)
                        if back == 0 and padding == LENGTHS:
                            for t in range(steps, L):
                                position = _position(padding, begin, t, b, B)
                                at = ((position * D + d) * H + unit) * stored
                                to = ((position * D + d) * parts * H + unit) * stored
                                for k in range(parts):
                                    _fill(grad_u + to + k * H * stored, units, real(0), storage, GRAD_CANDIDATE)
                                if skip_kind == SKIP_INPUT:
                                    _fill(grad_x + at, units, real(0), storage, GRAD_SKIP)
                        tile = (steps - 1) // TILE - back
                        if tile < 0:
                            continue
                        gates, row_at = (d * 2 * H + unit) * size, ((b * D + d) * H + unit) * size
                        start = saved + ((_saved_at(padding, begin, tile, b, B) * D + d) * H + unit) * size
                        _copy(c, C, start, READ, units, real)
                        for k in range(tile * TILE, min((tile + 1) * TILE, steps)):
                            position = _position(padding, begin, steps - 1 - k if d == 1 else k, b, B)
                            state = states + k % TILE * H * size
                            if padding == MASK and load(valid, position, np.uint8, READ) != 0:
                                _copy(state, STATES, c, C, units, real)
                                continue
                            u_row = u + ((position * D + d) * parts * H + unit) * stored
                            forget = forgets + k % TILE * H * size
                            ahead = D * parts * H * (1 if padding == PACKED else B) * (-1 if d == 1 else 1)
                            at = ((position * D + d) * H + unit) * stored
                            for block in range(blocks):
                                j = _start_of_block(block, units)
                                # What the next step needs here, and what the way back needs of this one.
                                prefetch(u_row + (ahead + j) * stored)
                                prefetch(u_row + (ahead + H + j) * stored)
                                for part in range(2, parts):
                                    prefetch(u_row + (part * H + j) * stored)
                                if skip_kind == SKIP_INPUT:
                                    prefetch(x + at + j * stored)
                                prefetch(grad_h + at + j * stored)
                                if j + WIDTH <= units and j == block * WIDTH:
                                    for i in range(WIDTH):
                                        _state_unit(
                                            j + i, True, H, u_row, bias + gates, weight_c + gates, c, forget, state,
                                            storage, real, version,
                                        )  # fmt: skip
                                else:
                                    for i in range(min(units, WIDTH)):
                                        _state_unit(
                                            j + i, j + i >= block * WIDTH, H, u_row, bias + gates, weight_c + gates, c,
                                            forget, state, storage, real, version,
                                        )  # fmt: skip
                        for k in range(min((tile + 1) * TILE, steps) - 1, tile * TILE - 1, -1):
                            position = _position(padding, begin, steps - 1 - k if d == 1 else k, b, B)
                            at = ((position * D + d) * H + unit) * stored
                            to = grad_u + ((position * D + d) * parts * H + unit) * stored
                            if padding == MASK and load(valid, position, np.uint8, READ) != 0:
                                for part in range(parts):
                                    _fill(to + part * H * stored, units, real(0), storage, GRAD_CANDIDATE)
                                if skip_kind == SKIP_INPUT:
                                    _fill(grad_x + at, units, real(0), storage, GRAD_SKIP)
                                continue
                            u_row = u + ((position * D + d) * parts * H + unit) * stored
                            forget, state = forgets + k % TILE * H * size, states + k % TILE * H * size
                            c_prev = start if k % TILE == 0 else state - H * size
                            sums = (((b * D + d) * 2) * H + unit) * size
                            for block in range(blocks):
                                j = _start_of_block(block, units)
                                if j + WIDTH <= units and j == block * WIDTH:
                                    for i in range(WIDTH):
                                        _backward_unit(
                                            j + i, True, H, u_row, x + at, scale_x, bias + gates, weight_c + gates,
                                            mask_c + row_at, forget, state, c_prev, grad_h + at,
                                            grad_c_n + row_at, to, grad_x + at, sums_bias + sums, sums_weight_c + sums,
                                            storage, real, version, nonlinearity, placement, skip_kind, has_mask_c,
                                        )  # fmt: skip
                                else:
                                    for i in range(min(units, WIDTH)):
                                        _backward_unit(
                                            j + i, j + i >= block * WIDTH, H, u_row, x + at, scale_x, bias + gates,
                                            weight_c + gates, mask_c + row_at, forget, state, c_prev,
                                            grad_h + at, grad_c_n + row_at, to, grad_x + at, sums_bias + sums,
                                            sums_weight_c + sums, storage, real, version, nonlinearity, placement,
                                            skip_kind, has_mask_c,
                                        )  # fmt: skip

    return _compile(backward, options, storage)


def _real(storage: Any) -> Any:
    """The type in which the state is kept and everything is computed."""
    return np.float64 if storage is np.float64 else np.float32


def _itemsize(storage: Any) -> int:
    return int(np.dtype(storage).itemsize)


class _Kernel(NamedTuple):
    """A compiled kernel: its address, and a Python function that calls it with the words it takes."""

    address: int
    call: Callable[[bytes], None]
    code: Any  # what owns the memory behind the address


def _compile(function: Callable[..., None], options: Options, storage: Any) -> _Kernel:
    what = options, storage, cpu_target.target_context.codegen().magic_tuple()  # the last: of the processor
    # a * b + c may be rounded once; nothing is reordered, and NaN and infinity keep their meaning.
    how: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
    compiled = compile_or_load(cfunc, types.void(types.int64), function, what, **how)
    return _Kernel(compiled.address, ctypes.CFUNCTYPE(None, ctypes.c_char_p)(compiled.address), compiled)


def _find_parallel() -> Any:
    """The entry point by which compilers start an OpenMP team, from the runtime that torch itself has loaded.

    So the kernels run on torch's own threads: no second pool competes with it for the cores. None where torch was
    built with another threading library.
    """
    try:
        library = ctypes.CDLL(str(next((pathlib.Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        start = library.GOMP_parallel
    except (StopIteration, OSError, AttributeError):
        return None
    start.argtypes, start.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return start


_start_team = _find_parallel()
_ELEMENTS_PER_THREAD = 1 << 14  # below this a thread costs more than it saves
_pack_words = struct.Struct("12qd14q").pack


class Launch(NamedTuple):
    """What of the recurrence a launch computes: the time from `first` up to `end`, and the directions.

    Backward's is of everything.
    """

    first: int
    end: int
    L: int
    B: int
    D: int
    H: int
    first_direction: int
    directions: int


def _tasks(launch: Launch, padding: int, n_threads: int) -> tuple[int, int, int, int]:
    """Threads, at most `n_threads`, tasks, rows of each task and units of each task."""
    rows, H = launch.B * launch.directions, launch.H
    if n_threads > 1:
        steps = (launch.end - launch.first) * (1 if padding == PACKED else launch.B)
        n_threads = max(1, min(n_threads, steps * launch.directions * H // _ELEMENTS_PER_THREAD))
    if n_threads == 1:
        return 1, 1, rows, H
    row_blocks = min(rows, n_threads)
    rows_per_task = -(-rows // row_blocks)
    # Where there are too few rows, their units are shared out, a whole number of cache lines to each thread.
    unit_blocks = n_threads // row_blocks
    units_per_task = -(-H // (unit_blocks * WIDTH)) * WIDTH if unit_blocks > 1 else H
    return n_threads, -(-rows // rows_per_task) * -(-H // units_per_task), rows_per_task, units_per_task


def _run(kernel: _Kernel, tasks: tuple[int, int, int, int], launch: Launch, scale_x: float, arrays: list[int]) -> None:
    """Run all tasks of a kernel on the threads. `arrays`: the addresses of its arrays, which the caller keeps alive."""
    n_threads = tasks[0]
    words = _pack_words(0, *tasks[1:], *launch, scale_x, *arrays, *[0] * (14 - len(arrays)))
    if n_threads == 1:
        kernel.call(words)  # which counts its task in these bytes; nobody else has seen them
        return
    memory = ctypes.create_string_buffer(words, len(words))
    if _start_team is not None:
        _start_team(kernel.address, ctypes.addressof(memory), n_threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address)
    team = [threading.Thread(target=call, args=(ctypes.addressof(memory),)) for _ in range(n_threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()


def _address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


STORAGE = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.bfloat16: BFLOAT16,
}  # fmt: skip


def forward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """h, c_n and, with `save_c`, what backward needs of c: the states at the start of every tile."""
    D, H = u.shape[-3], u.shape[-1]
    steps = len(u)  # L, and of sequences end to end all there are
    h = u.new_empty(*u.shape[:-3], D * H)
    c_n = bias.new_zeros(B, D * H) if c_0 is None else c_0.clone()
    saved = bias.new_empty(count_saved(options.padding, steps, B), D * H) if options.save_c else None
    if c_n.numel():
        # c_n holds the state from the start: no need to compile for an initial state, and once more without one.
        kernel = _forward_kernel(options._replace(has_c_0=False), STORAGE[u.dtype])
        launch = Launch(0, steps, L, B, D, H, 0, D)
        arrays = [_address(a) for a in (u, x, bias, weight_c, mask_c, valid, c_n, h, saved)]
        _run(kernel, _tasks(launch, options.padding, torch.get_num_threads()), launch, scale_x, arrays)
    return h, c_n, saved


_BYTES_AT_A_TIME = 16 << 20  # of u in inference: glibc's malloc keeps so much and needs no new pages for it


def layer_forward(
    options: Options, v: Tensor, weight: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None,
    c_0: Tensor | None, mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int, D: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h and c_n of a layer without gradients: u is computed for a piece of the time, used, and overwritten."""
    steps, rows = len(v), v.shape[1] if v.dim() == 3 else 1
    H, part = bias.shape[-1], weight.shape[0] // D
    h = v.new_empty(*v.shape[:-1], D * H)
    c_n = bias.new_zeros(B, D * H) if c_0 is None else c_0.clone()
    if not c_n.numel() or not steps:
        return h, c_n
    v = v.view(steps * rows, -1)
    pieces = max(1, -(-steps * rows * weight.shape[0] * v.element_size() // _BYTES_AT_A_TIME))
    kernel = _forward_kernel(options._replace(has_c_0=False), STORAGE[v.dtype])

    def run(first: int, end: int, first_direction: int, directions: int, u: Tensor | None) -> None:
        columns = slice(first_direction * part, (first_direction + directions) * part)
        u = product(v[first * rows : end * rows], weight[columns], out=u)
        launch = Launch(first, end, L, B, D, H, first_direction, directions)
        others = [_address(a) for a in (x, bias, weight_c, mask_c, valid, c_n, h)]
        u_of_step_0 = u.data_ptr() - first * rows * directions * part * u.element_size()
        _run(
            kernel, _tasks(launch, options.padding, torch.get_num_threads()), launch, scale_x, [u_of_step_0, *others, 0]
        )

    if pieces == 1:
        run(0, steps, 0, D, None)
        return h, c_n
    length = -(-steps // pieces)
    buffer = v.new_empty(length * rows, part)
    for first in range(0, steps, length):
        end = min(first + length, steps)
        u = buffer[: (end - first) * rows]
        run(first, end, 0, 1, u)
        if D == 2:  # from the end, in pieces of the same lengths
            run(steps - end, steps - first, 1, 1, u)
    return h, c_n


def step(
    kernel: _Kernel, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, scale_x: float, c: Tensor
) -> Tensor:
    """One step in one direction without gradients: h, (B, H). c, (B, H), holds the state before it, then after.

    The short path of streaming: `kernel` is that of `step_kernel`, and nobody checks the arguments again.
    """
    B, H = c.shape
    h = torch.empty_like(c)
    tasks, launch = _plan_step(B, H, torch.get_num_threads())
    arrays = [
        u.data_ptr(), 0 if x is None else x.data_ptr(), bias.data_ptr(), 0 if weight_c is None else weight_c.data_ptr(),
        0, 0, c.data_ptr(), h.data_ptr(), 0,
    ]  # fmt: skip
    _run(kernel, tasks, launch, scale_x, arrays)
    return h


@functools.lru_cache(1024)
def _plan_step(B: int, H: int, n_threads: int) -> tuple[tuple[int, int, int, int], Launch]:
    """How a step is launched on at most `n_threads` threads."""
    launch = Launch(0, 1, 1, B, 1, H, 0, 1)
    return _tasks(launch, NO_PADDING, n_threads), launch


@functools.cache
def step_kernel(version: int, nonlinearity: str, skip: int, dtype: torch.dtype) -> _Kernel:
    """The kernel of a step, which is that of a sequence."""
    options = Options(version, NONLINEARITIES[nonlinearity], PAPER, skip)
    return _forward_kernel(options, STORAGE[dtype])  # type: ignore[no-any-return]


def backward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, L: int, B: int, saved: Tensor, grad_h: Tensor, grad_c_n: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of u, x, bias, weight_c and c_0."""
    D, H = u.shape[-3], u.shape[-1]
    grad_u, grad_x = torch.empty_like(u), None if x is None else torch.empty_like(x)
    grad_c, sum_bias = grad_c_n.clone(), bias.new_zeros(B, D, 2, H)
    sum_weight_c = None if weight_c is None else torch.zeros_like(sum_bias)
    if grad_c.numel():
        kernel = _backward_kernel(options._replace(has_c_0=False), STORAGE[u.dtype])
        launch = Launch(0, len(u), L, B, D, H, 0, D)
        tasks = _tasks(launch, options.padding, torch.get_num_threads())
        scratch = bias.new_empty(tasks[1], 2 * TILE + 1, H)
        arrays = u, x, bias, weight_c, mask_c, valid, saved, grad_h, grad_c, grad_u, grad_x, sum_bias, sum_weight_c
        _run(kernel, tasks, launch, scale_x, [_address(a) for a in (*arrays, scratch)])
    return grad_u, grad_x, sum_bias.sum(0), None if sum_weight_c is None else sum_weight_c.sum(0), grad_c
