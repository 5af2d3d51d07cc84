"""What the CUDA kernels need beyond `numba.cuda`: the equations of `recurrence.py` compiled for a device, and words.

Kernels move words: one number, or two neighbours in one load or store. A word is an unsigned integer; `unpack` and
`pack` turn it into the numbers that are computed with and back.

In float32, sigmoid is five instructions on the GPU's approximate exponential and reciprocal: absolute error below
3e-7, the right limits at infinity, NaN stays NaN; tanh likewise, its relative error below 2e-6. In bfloat16, of 8
bits, two kinds of tanh are shorter: `coarse_tanh` for h and, in layers with a highway, `absolute_tanh` for derivatives.
The simulator runs `recurrence.py` and the plain functions here as they stand.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, cuda, float32, types, uint16
from numba.types import float16

from . import recurrence

SIMULATED = bool(getattr(cuda, "is_simulator", False)) or config.ENABLE_CUDASIM

if not SIMULATED and not hasattr(np, "row_stack"):
    # NumPy 2.5 has this alias no more, and numba-cuda 0.30 asks for it when it first compiles.
    np.row_stack = np.vstack
    try:
        importlib.import_module("numba.cuda.np.arrayobj")
    finally:
        del np.row_stack

# Numba has no bfloat16 that compiles without a C++ compiler; uint16 stands for it.
BFLOAT16 = uint16
WORDS = {16: types.uint16, 32: types.uint32, 64: types.uint64}  # by number of bits


def unpack(word, i, number):
    """The i-th number of a word, as float32 if it has 16 bits."""
    bits = int(word) >> (i * number.bitwidth) & (1 << number.bitwidth) - 1
    if number == BFLOAT16:  # the upper half of a float32
        return np.uint32(bits << 16).view(np.float32)
    value = getattr(np, f"uint{number.bitwidth}")(bits).view(getattr(np, f"float{number.bitwidth}"))
    return np.float32(value) if number == float16 else value


def pack(low, high, number, word):
    """A word of two numbers, rounded to the nearest if they have 16 bits; of `low` alone if it has space for one."""
    packed = 0
    for i, value in enumerate((low, high)[: word.bitwidth // number.bitwidth]):
        if number == BFLOAT16:
            bits = int(np.float32(value).view(np.uint32))
            bits = bits | 0x400000 if value != value else bits + 0x7FFF + (bits >> 16 & 1)
            bits >>= 16
        else:
            with np.errstate(over="ignore"):
                value = getattr(np, f"float{number.bitwidth}")(value)
            bits = int(value.view(getattr(np, f"uint{number.bitwidth}")))
        packed |= bits << (i * number.bitwidth)
    return getattr(np, f"uint{word.bitwidth}")(packed)


def address(array, at):
    """Where array[at] lies, for `shift`, `copy` and `store`."""
    return array, at


def shift(start, k, stride):
    """The address k * stride elements further."""
    array, at = start
    return array, at + k * stride


def store(start, k, left, value):
    """Write to the element at an address if k < left."""
    array, at = start
    if k < left:
        array[at] = value


def shared_address(array, at):
    """Where array[at] lies in shared memory, for `copy`."""
    return array, at


def copy(to, i, start, k, left):
    """Begin to copy the element at an address to shared memory, i elements behind `to`, if k < left, else write 0."""
    (array, at), (source, source_at) = to, start
    array[at + i] = source[source_at] if k < left else array.dtype.type(0)


def finish_copies():
    """Wait until all that this thread copies has arrived."""


def narrow(n):
    """n as an int32. LLVM would compare and add in 64 bits if it knew where n comes from, at twice the cost."""
    return np.int32(n)


def select(condition, a, b):
    """`a if condition else b`, of which LLVM would make a branch."""
    return a if condition else b


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a plain function callable from kernels, inlined."""
    if not SIMULATED:
        _inlined(function, lambda *args: function)
    return function


def _inlined(function: Callable[..., Any], choose: Callable[..., Any]) -> None:
    # Inlined by LLVM: Numba's own inlining (inline="always") gives the same machine code after ten times as long.
    overload(function, target="cuda", jit_options={"forceinline": True}, strict=False)(choose)


def _approximate(instruction: str) -> Any:
    """A PTX instruction with one float32 operand and result as a device function."""

    @intrinsic
    def function(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            f32 = ir.FloatType()
            asm = ir.InlineAsm(ir.FunctionType(f32, [f32]), f"{instruction} $0, $1;", "=f,f", side_effect=False)
            return builder.call(asm, args)

        return types.float32(types.float32), codegen

    return function


# The constraint of an operand of inline assembly, by number of bits.
_OPERAND = {16: "h", 32: "r", 64: "l"}


def _has_8_0() -> bool:
    """Whether the device that is compiled for has the instructions that came with compute capability 8.0.

    They convert to bfloat16, and copy to shared memory while threads go on.
    """
    return bool(ConfigStack().top().compute_capability >= (8, 0))


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, of two equally near the even one. NaN stays NaN."""
    i16, i32 = ir.IntType(16), ir.IntType(32)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.add(bits, builder.add(odd, i32(0x7FFF)))
    quiet = builder.or_(bits, i32(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, i32(16)), i16)


def _encode(builder: Any, value: Any, number: Any) -> Any:
    """The bits of a number in memory."""
    if number == BFLOAT16:
        if not _has_8_0():
            return _round_to_bfloat16(builder, value)
        convert = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
        return builder.call(ir.InlineAsm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f", side_effect=False), [value])
    if number == float16:
        value = builder.fptrunc(value, ir.HalfType())
    return builder.bitcast(value, ir.IntType(number.bitwidth))


def _encode_two(builder: Any, low: Any, high: Any, number: Any) -> Any:
    i = ir.IntType(2 * number.bitwidth)
    if number == BFLOAT16 and _has_8_0():
        convert = ir.FunctionType(i, [ir.FloatType(), ir.FloatType()])
        asm = ir.InlineAsm(convert, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", side_effect=False)
        return builder.call(asm, [high, low])
    if number == float32:  # two registers
        pair = ir.Constant(ir.VectorType(ir.FloatType(), 2), ir.Undefined)
        for index, value in enumerate((low, high)):
            pair = builder.insert_element(pair, value, ir.IntType(32)(index))
        return builder.bitcast(pair, i)
    bits = [builder.zext(_encode(builder, value, number), i) for value in (low, high)]
    return builder.or_(bits[0], builder.shl(bits[1], i(number.bitwidth)))


if not SIMULATED:
    from llvmlite import ir
    from numba.core.targetconfig import ConfigStack
    from numba.cuda.extending import intrinsic, overload

    @intrinsic
    def _unpack(typingctx: Any, word: Any, i: Any, number: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size, whole = ir.IntType(element.bitwidth), ir.IntType(word.bitwidth)
            if element == float32 and word.bitwidth == 64:  # two registers
                pair = builder.bitcast(args[0], ir.VectorType(ir.FloatType(), 2))
                return builder.extract_element(pair, builder.trunc(args[1], ir.IntType(32)))
            bits = args[0]
            if word.bitwidth > element.bitwidth:
                shift = builder.mul(builder.trunc(args[1], whole), whole(element.bitwidth))
                bits = builder.trunc(builder.lshr(bits, shift), size)
            if element == BFLOAT16:
                i32 = ir.IntType(32)
                return builder.bitcast(builder.shl(builder.zext(bits, i32), i32(16)), ir.FloatType())
            if element == float16:
                return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
            return builder.bitcast(bits, context.get_data_type(element))

        element = number.dtype
        real = float32 if element.bitwidth == 16 else element
        return real(word, types.int64, number), codegen

    @intrinsic
    def _pack(typingctx: Any, low: Any, high: Any, number: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if element.bitwidth == word.dtype.bitwidth:
                return _encode(builder, args[0], element)
            return _encode_two(builder, args[0], args[1], element)

        element = number.dtype
        real = float32 if element.bitwidth == 16 else element
        return word.dtype(real, real, number, word), codegen

    # Through assembly, or LLVM would compute all addresses ahead and have no registers left for anything else.

    @intrinsic
    def _address(typingctx: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i64 = ir.IntType(64)
            asm = ir.InlineAsm(ir.FunctionType(i64, [i64]), "cvta.to.global.u64 $0, $1;", "=l,l")
            pointer = builder.ptrtoint(builder.gep(args[0], [args[1]]), i64)
            return builder.inttoptr(builder.call(asm, [pointer]), args[0].type)

        return array(array, types.int64), codegen

    @intrinsic
    def _shift(typingctx: Any, start: Any, k: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32, i64 = ir.IntType(32), ir.IntType(64)
            pointer, factor = builder.ptrtoint(args[0], i64), builder.mul(args[1], i64(start.dtype.bitwidth // 8))
            asm = ir.InlineAsm(ir.FunctionType(i64, [i32, i32, i64]), "mad.wide.s32 $0, $1, $2, $3;", "=l,r,r,l")
            moved = builder.call(asm, [args[2], builder.trunc(factor, i32), pointer])
            return builder.inttoptr(moved, args[0].type)

        return start(start, types.int64, types.int32), codegen

    @intrinsic
    def _store(typingctx: Any, start: Any, k: Any, left: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits, i32, i64 = start.dtype.bitwidth, ir.IntType(32), ir.IntType(64)
            asm = ir.InlineAsm(
                ir.FunctionType(ir.VoidType(), [i64, i32, i32, ir.IntType(bits)]),
                f"{{ .reg .pred p; setp.lt.s32 p, $1, $2; @p st.global.b{bits} [$0], $3; }}",
                f"l,r,r,{_OPERAND[bits]},~{{memory}}",
                side_effect=True,
            )
            builder.call(asm, [builder.ptrtoint(args[0], i64), builder.trunc(args[1], i32), args[2], args[3]])
            return context.get_dummy_value()

        return types.void(start, types.int64, types.int32, start.dtype), codegen

    @intrinsic
    def _shared_address(typingctx: Any, array: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32, i64 = ir.IntType(32), ir.IntType(64)
            data = context.make_array(array)(context, builder, args[0]).data
            pointer = builder.gep(data, [args[1]])
            asm = ir.InlineAsm(ir.FunctionType(i64, [i64]), "cvta.to.shared.u64 $0, $1;", "=l,l")
            return builder.trunc(builder.call(asm, [builder.ptrtoint(pointer, i64)]), i32)

        return types.uint32(array, types.int64), codegen

    @intrinsic
    def _copy(typingctx: Any, to: Any, i: Any, start: Any, k: Any, left: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits, i32, i64 = start.dtype.bitwidth, ir.IntType(32), ir.IntType(64)
            size = bits // 8
            if size >= 4 and _has_8_0():
                text = f"setp.ge.s32 p, $2, $3; cp.async.ca.shared.global [$0], [$1], {size}, p;"
            else:
                text = (
                    f".reg .b{bits} v; setp.lt.s32 p, $2, $3; mov.b{bits} v, 0; "
                    f"@p ld.global.b{bits} v, [$1]; st.shared.b{bits} [$0], v;"
                )
            function = ir.FunctionType(ir.VoidType(), [i32, i64, i32, i32])
            asm = ir.InlineAsm(function, f"{{ .reg .pred p; {text} }}", "r,l,r,r,~{memory}", side_effect=True)
            at = builder.add(args[0], builder.mul(builder.trunc(args[1], i32), i32(size)))
            builder.call(asm, [at, builder.ptrtoint(args[2], i64), builder.trunc(args[3], i32), args[4]])
            return context.get_dummy_value()

        return types.void(types.uint32, types.int64, start, types.int64, types.int32), codegen

    @intrinsic
    def _finish_copies(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if _has_8_0():
                wait = ir.FunctionType(ir.VoidType(), [])
                builder.call(ir.InlineAsm(wait, "cp.async.wait_all;", "~{memory}", side_effect=True), [])
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def _select(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(*args)

        return a(types.boolean, a, a), codegen

    @intrinsic
    def _narrow(typingctx: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32 = ir.IntType(32)
            asm = ir.InlineAsm(ir.FunctionType(i32, [i32]), "mov.b32 $0, $1;", "=r,r", side_effect=False)
            return builder.call(asm, [builder.trunc(args[0], i32)])

        return types.int32(types.int64), codegen

    _inlined(address, lambda array, at: lambda array, at: _address(array, at))
    _inlined(shift, lambda start, k, stride: lambda start, k, stride: _shift(start, k, stride))
    _inlined(store, lambda start, k, left, value: lambda start, k, left, value: _store(start, k, left, value))
    _inlined(shared_address, lambda array, at: lambda array, at: _shared_address(array, at))
    _inlined(copy, lambda to, i, start, k, left: lambda to, i, start, k, left: _copy(to, i, start, k, left))
    _inlined(finish_copies, lambda: lambda: _finish_copies())
    _inlined(select, lambda condition, a, b: lambda condition, a, b: _select(condition, a, b))
    _inlined(narrow, lambda n: lambda n: _narrow(n))
    _inlined(unpack, lambda word, i, number: lambda word, i, number: _unpack(word, i, number))
    _inlined(pack, lambda low, high, number, word: lambda low, high, number, word: _pack(low, high, number, word))

    _exp2, _reciprocal = _approximate("ex2.approx.ftz.f32"), _approximate("rcp.approx.ftz.f32")
    _approximate_tanh = _approximate("tanh.approx.f32")  # relative error below 2^-10.9
    _LOG2_E, _ONE = np.float32(math.log2(math.e)), np.float32(1)
    _TWO_LOG2_E = np.float32(2 * math.log2(math.e))
    _HALF, _TANH_SERIES_BELOW, _MINUS_THIRD = np.float32(0.5), np.float32(0.06), np.float32(-1 / 3)

    def _exp_float32(x):
        return _exp2(x * _LOG2_E)

    def _sigmoid_float32(x):
        return _reciprocal(_ONE + _exp2(x * -_LOG2_E))

    def _gate_float32(u, bias, weight, c, version):
        # sigmoid(u + bias + weight * c), the exponent's factor multiplied out: what stays in the loop is one
        # instruction less, and in version 2 only one stands between c and the exponential.
        z = u * -_LOG2_E + bias * -_LOG2_E
        if version == 2:
            z = weight * -_LOG2_E * c + z
        return _reciprocal(_ONE + _exp2(z))

    def _sigmoid_float64(x):
        return 1 / (1 + math.exp(-x))

    def _absolute_tanh_float32(x):
        # 1 - 2 / (exp(2 x) + 1)
        return _ONE - _reciprocal(_HALF * _exp2(x * _TWO_LOG2_E) + _HALF)

    def _tanh_float32(x):
        # Near zero, where the difference loses its digits, the Taylor series.
        series = x * (_ONE + x * x * _MINUS_THIRD)
        return _select(abs(x) < _TANH_SERIES_BELOW, series, recurrence.absolute_tanh(x))

    def _by_precision(in_float32: Callable[..., Any], in_float64: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: in_float32 if x == float32 else in_float64

    def _gate_float64(u, bias, weight, c, version):
        return _sigmoid_float64(u + bias + weight * c if version == 2 else u + bias)

    _inlined(recurrence.gate, lambda u, bias, weight, c, version: _gate_float32 if bias == float32 else _gate_float64)
    _inlined(recurrence.coarse_tanh, lambda x: lambda x: _approximate_tanh(x))
    _inlined(recurrence.absolute_tanh, lambda x: _absolute_tanh_float32)
    _inlined(recurrence.sigmoid, _by_precision(_sigmoid_float32, _sigmoid_float64))
    _inlined(recurrence.tanh, _by_precision(_tanh_float32, lambda x: math.tanh(x)))
    _inlined(recurrence.exp, _by_precision(_exp_float32, lambda x: math.exp(x)))

_APPROXIMATED = recurrence.gate, recurrence.coarse_tanh, recurrence.absolute_tanh
for _function in recurrence.COMPOSED:
    if SIMULATED or _function not in _APPROXIMATED:
        device_function(_function)
