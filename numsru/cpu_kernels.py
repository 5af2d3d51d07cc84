"""The CPU kernels, forward and backward, and the host functions that allocate their results and run them.

A kernel goes through time; at each step it goes through the rows of its task (a row is one batch row in one
direction) and along the units of a row, a loop that LLVM turns into vector instructions. No row depends on another,
so tasks may run on any thread in any order and the result has the same bits.

Kernels take one argument, the address of an array of 64-bit words: addresses and sizes, in the order in which the
host functions list them.
"""

import ctypes
import functools
import pathlib
import threading
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from numba.extending import register_jitable
from torch import Tensor

from .cpu_intrinsics import READ, fetch_add, load, store
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
)

# Alias scopes of what the kernels write, see cpu_intrinsics: each is a separate piece of memory.
C, C_N, H_OUT, GRAD_C, GRAD_CANDIDATE, GRAD_FORGET = range(1, 7)
GRAD_RESET, GRAD_SKIP, BIAS_F, BIAS_R, WEIGHT_F, WEIGHT_R = range(7, 13)

# a * b + c may be rounded once; nothing is reordered, and NaN and infinity keep their meaning.
_compile = cfunc(types.void(types.int64), error_model="numpy", fastmath={"contract"})


@register_jitable
def _word(args, i):
    return load(args, i, np.int64, READ)


@register_jitable
def _next_task(args):
    """Take the next block of work: first row, row after the last, first unit, number of units. No rows: all is done."""
    task = fetch_add(args, 1)
    n_tasks, rows_per_task, units_per_task = _word(args, 1), _word(args, 2), _word(args, 3)
    rows, H = _word(args, 5), _word(args, 7)
    if task >= n_tasks:
        return 0, 0, 0, 0
    row_blocks = (rows + rows_per_task - 1) // rows_per_task
    row, unit = task % row_blocks * rows_per_task, task // row_blocks * units_per_task
    return row, min(row + rows_per_task, rows), unit, min(units_per_task, H - unit)


@register_jitable
def _count_steps(valid, padding, b, L):
    """Steps that batch row b takes in either direction; those of padding only where it may stand anywhere."""
    if padding == LENGTHS:
        return load(valid, b, np.int64, READ)
    if padding == PACKED:
        return load(valid, b + 1, np.int64, READ) - load(valid, b, np.int64, READ)
    return L


@register_jitable
def _position(valid, padding, t, b, B):
    """Where step t of batch row b stands among all steps of all rows."""
    if padding == PACKED:
        return load(valid, b, np.int64, READ) + t
    return t * B + b


@register_jitable
def _slot(valid, padding, s, b, B, save_c):
    """Where c holds the state of batch row b before its s-th step. What is not saved takes turns in two slots."""
    if not save_c:
        return s % 2 * B + b
    return _position(valid, padding, s, b, B) + (b if padding == PACKED else 0)


@functools.cache
def _forward_kernel(options: Options, real: Any) -> Any:
    """Writes h, c and c_n."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, save_c = options
    parts, size = options.parts, np.dtype(real).itemsize

    @_compile
    def forward(args):
        L, rows, D, H = _word(args, 4), _word(args, 5), _word(args, 6), _word(args, 7)
        scale_x, u, x, bias = real(load(args, 8, np.float64, READ)), _word(args, 9), _word(args, 10), _word(args, 11)
        weight_c, c_0, mask_c, valid = _word(args, 12), _word(args, 13), _word(args, 14), _word(args, 15)
        h, c, c_n = _word(args, 16), _word(args, 17), _word(args, 18)
        B = rows // D
        while True:
            first_row, end_row, first_unit, units = _next_task(args)
            if first_row == end_row:
                return
            for row in range(first_row, end_row):
                b, d, at = row // D, row % D, row * H + first_unit
                c_next = c + ((_slot(valid, padding, 0, b, B, save_c) * D + d) * H + first_unit) * size
                for j in range(units):
                    store(c_next, j, load(c_0 + at * size, j, real, READ) if c_0 else real(0), C)
            # Sequences end to end go through time one after the other, the rows of a batch together.
            together = 1 if padding == PACKED else end_row - first_row
            for first in range(first_row, end_row, together):
                longest = _count_steps(valid, padding, first // D, L) if padding == PACKED else L
                for s in range(longest):
                    for row in range(first, first + together):
                        b, d, steps = row // D, row % D, _count_steps(valid, padding, row // D, L)
                        if s >= steps:
                            if padding == LENGTHS:
                                h_row = h + ((s * B + b) * D * H + d * H + first_unit) * size
                                for j in range(units):
                                    store(h_row, j, real(0), H_OUT)
                            continue
                        t = steps - 1 - s if d == 1 else s
                        position = _position(valid, padding, t, b, B)
                        at = (position * D + d) * H + first_unit
                        h_row = h + at * size
                        c_prev = c + ((_slot(valid, padding, s, b, B, save_c) * D + d) * H + first_unit) * size
                        c_next = c + ((_slot(valid, padding, s + 1, b, B, save_c) * D + d) * H + first_unit) * size
                        if padding == MASK and load(valid, position, np.uint8, READ) != 0:
                            for j in range(units):
                                store(c_next, j, load(c_prev, j, real, C), C)
                                store(h_row, j, real(0), H_OUT)
                            continue
                        u_row = u + ((position * D + d) * parts * H + first_unit) * size
                        x_row, mask_row = x + at * size, mask_c + (row * H + first_unit) * size
                        gate_row = (d * 2 * H + first_unit) * size
                        for j in range(units):
                            c_j = load(c_prev, j, real, C)
                            weight_f = load(weight_c + gate_row, j, real, READ) if version == 2 else real(0)
                            weight_r = load(weight_c + gate_row, H + j, real, READ) if version == 2 else real(0)
                            mask = load(mask_row, j, real, READ) if has_mask_c else real(1)
                            skip = real(0)
                            if skip_kind == SKIP_INPUT:
                                skip = scale_x * load(x_row, j, real, READ)
                            elif skip_kind == SKIP_PROJECTED:
                                skip = load(u_row, 3 * H + j, real, READ)
                            bias_f, bias_r = (
                                load(bias + gate_row, j, real, READ),
                                load(bias + gate_row, H + j, real, READ),
                            )
                            f = gate(load(u_row, H + j, real, READ), bias_f, weight_f, c_j, version)
                            r = gate(load(u_row, 2 * H + j, real, READ), bias_r, weight_r, c_j, version)
                            c_j = next_state(f, load(u_row, j, real, READ), c_j)
                            store(c_next, j, c_j, C)
                            store(h_row, j, output(c_j, r, skip, mask, nonlinearity, placement), H_OUT)
            for row in range(first_row, end_row):
                b, d, at = row // D, row % D, row * H + first_unit
                last = _slot(valid, padding, _count_steps(valid, padding, b, L), b, B, save_c)
                c_prev = c + ((last * D + d) * H + first_unit) * size
                for j in range(units):
                    store(c_n + at * size, j, load(c_prev, j, real, C), C_N)

    return forward


@functools.cache
def _backward_kernel(options: Options, real: Any) -> Any:
    """Writes grad_u and grad_x, carries grad_c from the last step to the first in place, adds up the gates' sums."""
    version, nonlinearity, placement, skip_kind, padding, _, has_mask_c, _ = options
    parts, size = options.parts, np.dtype(real).itemsize

    @_compile
    def backward(args):
        L, rows, D, H = _word(args, 4), _word(args, 5), _word(args, 6), _word(args, 7)
        scale_x, u, x, bias = real(load(args, 8, np.float64, READ)), _word(args, 9), _word(args, 10), _word(args, 11)
        weight_c, mask_c, valid, c = _word(args, 12), _word(args, 13), _word(args, 14), _word(args, 15)
        grad_h, grad_c, grad_u, grad_x = _word(args, 16), _word(args, 17), _word(args, 18), _word(args, 19)
        sum_bias, sum_weight_c = _word(args, 20), _word(args, 21)
        B = rows // D
        while True:
            first_row, end_row, first_unit, units = _next_task(args)
            if first_row == end_row:
                return
            # Sequences end to end go through time one after the other, the rows of a batch together.
            together = 1 if padding == PACKED else end_row - first_row
            for first in range(first_row, end_row, together):
                longest = _count_steps(valid, padding, first // D, L) if padding == PACKED else L
                for s in range(longest - 1, -1, -1):
                    for row in range(first, first + together):
                        b, d, steps = row // D, row % D, _count_steps(valid, padding, row // D, L)
                        t = steps - 1 - s if d == 1 and s < steps else s
                        position = _position(valid, padding, t, b, B)
                        at = (position * D + d) * H + first_unit
                        in_u = ((position * D + d) * parts * H + first_unit) * size
                        u_row, grad_u_row = u + in_u, grad_u + in_u
                        x_row, grad_x_row, grad_h_row = x + at * size, grad_x + at * size, grad_h + at * size
                        if s >= steps and padding == PACKED:
                            continue
                        if s >= steps or (padding == MASK and load(valid, position, np.uint8, READ) != 0):
                            for k in range(parts):
                                for j in range(units):
                                    store(grad_u_row, k * H + j, real(0), GRAD_CANDIDATE)
                            if skip_kind == SKIP_INPUT:
                                for j in range(units):
                                    store(grad_x_row, j, real(0), GRAD_SKIP)
                            continue
                        c_prev = c + ((_slot(valid, padding, s, b, B, True) * D + d) * H + first_unit) * size
                        c_next = c + ((_slot(valid, padding, s + 1, b, B, True) * D + d) * H + first_unit) * size
                        state = (row * H + first_unit) * size
                        grad_c_row, mask_row = grad_c + state, mask_c + state
                        gate_row = (d * 2 * H + first_unit) * size
                        sum_row = (row * 2 * H + first_unit) * size
                        for j in range(units):
                            c_j = load(c_prev, j, real, READ)
                            weight_f = load(weight_c + gate_row, j, real, READ) if version == 2 else real(0)
                            weight_r = load(weight_c + gate_row, H + j, real, READ) if version == 2 else real(0)
                            mask = load(mask_row, j, real, READ) if has_mask_c else real(1)
                            skip = real(0)
                            if skip_kind == SKIP_INPUT:
                                skip = scale_x * load(x_row, j, real, READ)
                            elif skip_kind == SKIP_PROJECTED:
                                skip = load(u_row, 3 * H + j, real, READ)
                            bias_f, bias_r = (
                                load(bias + gate_row, j, real, READ),
                                load(bias + gate_row, H + j, real, READ),
                            )
                            f = gate(load(u_row, H + j, real, READ), bias_f, weight_f, c_j, version)
                            r = gate(load(u_row, 2 * H + j, real, READ), bias_r, weight_r, c_j, version)
                            grad_candidate, grad_forget, grad_reset, grad_skip, grad_c_prev = backward_step(
                                load(grad_h_row, j, real, READ), load(grad_c_row, j, real, GRAD_C),
                                load(c_next, j, real, READ), c_j, f, r, load(u_row, j, real, READ), skip, mask,
                                weight_f, weight_r, version, nonlinearity, placement,
                            )  # fmt: skip
                            store(grad_c_row, j, grad_c_prev, GRAD_C)
                            store(grad_u_row, j, grad_candidate, GRAD_CANDIDATE)
                            store(grad_u_row, H + j, grad_forget, GRAD_FORGET)
                            store(grad_u_row, 2 * H + j, grad_reset, GRAD_RESET)
                            if skip_kind == SKIP_INPUT:
                                store(grad_x_row, j, scale_x * grad_skip, GRAD_SKIP)
                            elif skip_kind == SKIP_PROJECTED:
                                store(grad_u_row, 3 * H + j, grad_skip, GRAD_SKIP)
                            sum_f, sum_r = sum_bias + sum_row, sum_bias + sum_row + H * size
                            store(sum_f, j, load(sum_f, j, real, BIAS_F) + grad_forget, BIAS_F)
                            store(sum_r, j, load(sum_r, j, real, BIAS_R) + grad_reset, BIAS_R)
                            if version == 2:
                                sum_f, sum_r = sum_weight_c + sum_row, sum_weight_c + sum_row + H * size
                                store(sum_f, j, load(sum_f, j, real, WEIGHT_F) + grad_forget * c_j, WEIGHT_F)
                                store(sum_r, j, load(sum_r, j, real, WEIGHT_R) + grad_reset * c_j, WEIGHT_R)

    return backward


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


def _run(kernel: Any, L: int, rows: int, D: int, H: int, scale_x: float, u: Tensor, *others: Tensor | None) -> None:
    arrays = u, *others
    n_threads = max(1, min(torch.get_num_threads(), u.numel() // (3 * _ELEMENTS_PER_THREAD)))
    row_blocks = min(rows, n_threads)
    rows_per_task = -(-rows // row_blocks)
    # Where there are too few rows, their units are shared out, a whole number of cache lines to each thread.
    unit_blocks = n_threads // row_blocks
    units_per_task = -(-H // (unit_blocks * 64)) * 64 if unit_blocks > 1 else H
    n_tasks = -(-rows // rows_per_task) * -(-H // units_per_task)
    words = np.array(
        [0, n_tasks, rows_per_task, units_per_task, L, rows, D, H, 0]
        + [0 if a is None else a.data_ptr() for a in arrays],
        np.int64,
    )
    words[8:9].view(np.float64)[0] = scale_x
    address = words.ctypes.data
    if n_threads == 1:
        kernel.ctypes(address)
    elif _start_team is not None:
        _start_team(kernel.address, address, n_threads, 0)
    else:

        def work(memory: Any = (words, arrays)) -> None:  # kept alive even where Ctrl-C ends the wait below
            kernel.ctypes(address)

        team = [threading.Thread(target=work) for _ in range(n_threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()


def _real(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def forward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, c_0: Tensor | None,
    mask_c: Tensor | None, valid: Tensor | None, scale_x: float, L: int, B: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """h, c_n and, with `save_c`, what backward needs of c: the states before every step and after the last."""
    D, H = u.shape[-3], u.shape[-1]
    positions = u.shape[:-3].numel()
    h, c_n = u.new_empty(*u.shape[:-3], D * H), u.new_empty(B, D * H)
    c = u.new_empty(positions + B if options.save_c else 2 * B, D * H)
    if c_n.numel():
        # The address of c_0 tells the kernel whether there is one: no need to compile it twice.
        kernel = _forward_kernel(options._replace(has_c_0=False), _real(u.dtype))
        _run(kernel, L, B * D, D, H, scale_x, u, x, bias, weight_c, c_0, mask_c, valid, h, c, c_n)
    return h, c_n, c if options.save_c else None


def backward(
    options: Options, u: Tensor, x: Tensor | None, bias: Tensor, weight_c: Tensor | None, mask_c: Tensor | None,
    valid: Tensor | None, scale_x: float, L: int, B: int, c: Tensor, grad_h: Tensor, grad_c_n: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of u, x, bias, weight_c and c_0."""
    D, H = u.shape[-3], u.shape[-1]
    grad_u, grad_x = torch.empty_like(u), None if x is None else torch.empty_like(x)
    grad_c, sum_bias = grad_c_n.clone(), u.new_zeros(B, D, 2, H)
    sum_weight_c = None if weight_c is None else torch.zeros_like(sum_bias)
    if grad_c.numel():
        kernel = _backward_kernel(options._replace(has_c_0=False), _real(u.dtype))
        arguments = u, x, bias, weight_c, mask_c, valid, c, grad_h, grad_c, grad_u, grad_x, sum_bias, sum_weight_c
        _run(kernel, L, B * D, D, H, scale_x, *arguments)
    return grad_u, grad_x, sum_bias.sum(0), None if sum_weight_c is None else sum_weight_c.sum(0), grad_c
