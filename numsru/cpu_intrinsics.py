"""The primitives that the CPU loops need: memory access by address, and exp, tanh and sigmoid that vectorise.

Importing this module makes the functions of `recurrence.py` callable from Numba's CPU compiler. In float32 the three
transcendental functions are polynomials: the library's are scalar calls, which keep LLVM from vectorising a loop
and take ten times as long. In float64 they are the library's.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from . import recurrence

# Arrays that a kernel writes never overlap any other array it touches. Each has a scope of its own, all arrays that
# are only read share READ; loads and stores carry this as LLVM alias metadata. Without it LLVM gives up vectorising.
N_SCOPES = 16
READ = 0


def _annotate(builder: Any, instruction: Any, scope: int) -> None:
    module = builder.module
    domain = module.add_metadata(["numsru"])
    scopes = [module.add_metadata([f"numsru.{i}", domain]) for i in range(N_SCOPES)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata([s for i, s in enumerate(scopes) if i != scope]))


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a plain function callable from kernels, inlined; constants among its arguments stay constants in it."""
    overload(function, jit_options={"forceinline": True}, strict=False, prefer_literal=True)(lambda *args: function)
    return function


# Floats of 16 bits are computed with in float32. Numba has no bfloat16; uint16 stands for it.
BFLOAT16 = np.uint16
_BFLOAT16 = types.uint16
_FLOAT_OF_16_BITS = (types.float16, _BFLOAT16)


def _pointer(context: Any, builder: Any, address: Any, index: Any, element: Any) -> Any:
    if element == types.float16:
        in_memory = ir.HalfType()
    elif element == _BFLOAT16:
        in_memory = ir.IntType(16)
    else:
        in_memory = context.get_data_type(element)
    return builder.gep(builder.inttoptr(address, in_memory.as_pointer()), [index])


@intrinsic(prefer_literal=True)
def load(typingctx: Any, address: Any, index: Any, dtype: Any, scope: Any) -> Any:
    """`((dtype*) address)[index]`; of 16-bit floats as float32. `scope` is a constant, see `N_SCOPES`."""
    element = dtype.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, args[0], args[1], element))
        _annotate(builder, value, scope.literal_value)
        if element == types.float16:
            return builder.fpext(value, ir.FloatType())
        if element == _BFLOAT16:  # the upper half of a float32
            i32 = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(value, i32), i32(16)), ir.FloatType())
        return value

    result = types.float32 if element in _FLOAT_OF_16_BITS else element
    return result(types.int64, types.int64, dtype, scope), codegen


@intrinsic(prefer_literal=True)
def store(typingctx: Any, address: Any, index: Any, value: Any, dtype: Any, scope: Any) -> Any:
    """`((dtype*) address)[index] = value`, rounded to the nearest of 16 bits. `scope` is a constant, see `N_SCOPES`."""
    element = dtype.dtype
    given = types.float32 if element in _FLOAT_OF_16_BITS else element

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if element == types.float16:
            value = builder.fptrunc(value, ir.HalfType())
        elif element == _BFLOAT16:
            value = _upper_half(builder, value)
        pointer = _pointer(context, builder, args[0], args[1], element)
        _annotate(builder, builder.store(value, pointer), scope.literal_value)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, given, dtype, scope), codegen


def _upper_half(builder: Any, value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, of two equally near the even one. NaN stays NaN."""
    i16, i32 = ir.IntType(16), ir.IntType(32)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
    rounded = builder.add(bits, builder.add(odd, i32(0x7FFF)))
    quiet = builder.or_(bits, i32(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, i32(16)), i16)


@intrinsic
def prefer_wide_vectors(typingctx: Any) -> Any:
    """Have LLVM use vectors of 512 bits in the calling function where there are any.

    For most of Intel's processors LLVM stays at 256 bits, since loops with little arithmetic gain nothing beyond. The
    kernels have much.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite's `add` takes LLVM's own attributes alone, not those of a target, which are strings.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Have the cache line at `address`, which need not exist, brought near."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], _PREFETCH)
        read, keep, data = i32(0), i32(3), i32(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_PREFETCH = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[ir.IntType(32)] * 3])


@intrinsic
def fetch_add(typingctx: Any, address: Any, increment: Any) -> Any:
    """Add to the int64 at `address` atomically; returns its value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], cgutils.intp_t.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _times_power_of_two(typingctx: Any, x: Any, n: Any) -> Any:
    """x 2^n for float32 x and n = 1.5 * 2^23 + an integer: that float's low bits are the integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[1], i32), i32(23))
        bits = builder.add(builder.bitcast(args[0], i32), exponent)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32, types.float32), codegen


_MAGIC = np.float32(1.5 * 2**23)  # adding it rounds a small float32 to an integer
_LOG2_E = np.float32(1.44269504088896341)
# ln 2 in two parts, the first exact in few bits, and Cephes' polynomial for exp on [-ln(2)/2, ln(2)/2].
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E0, _E1, _E2, _E3, _E4, _E5 = (
    np.float32(e)
    for e in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
_ONE = np.float32(1)


@register_jitable
def _exp_float32(x):
    """exp(x) for x in [-87, 87] to 3 units in the last place; beyond, the value at the bound. NaN stays NaN."""
    given = x
    x = np.float32(87) if x > np.float32(87) else x
    x = np.float32(-87) if x < np.float32(-87) else x
    shifted = x * _LOG2_E + _MAGIC
    n = shifted - _MAGIC
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _E0
    y = _times_power_of_two(p * (r * r) + r + _ONE, shifted)
    return y if given == given else given  # the integer arithmetic on its bits may make a number of NaN


# Eigen's rational approximation of tanh, an odd polynomial over an even one, good to 3e-7 up to the bound.
_TANH_BOUND = np.float32(7.90531110763549805)
_A1, _A3, _A5, _A7, _A9, _A11, _A13 = (
    np.float32(a)
    for a in (
        4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
        -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16,
    )
)  # fmt: skip
_B0, _B2, _B4, _B6 = (
    np.float32(b) for b in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)


@register_jitable
def _tanh_float32(x):
    """tanh(x), absolute error at most 3e-7 and relative at most 1e-6. NaN stays NaN."""
    x = _TANH_BOUND if x > _TANH_BOUND else x
    x = -_TANH_BOUND if x < -_TANH_BOUND else x
    y = x * x
    p = (((((_A13 * y + _A11) * y + _A9) * y + _A7) * y + _A5) * y + _A3) * y + _A1
    q = ((_B6 * y + _B4) * y + _B2) * y + _B0
    return x * p / q


@register_jitable
def _sigmoid_float32(x):
    return _ONE / (_ONE + _exp_float32(-x))


def _by_precision(float32: Callable[..., Any], float64: Callable[..., Any]) -> Callable[..., Any]:
    def choose(x: Any) -> Any:
        return float32 if x == types.float32 else float64

    return choose


overload(recurrence.exp, strict=False)(_by_precision(lambda x: _exp_float32(x), lambda x: math.exp(x)))
overload(recurrence.tanh, strict=False)(_by_precision(lambda x: _tanh_float32(x), lambda x: math.tanh(x)))
overload(recurrence.sigmoid, strict=False)(
    _by_precision(lambda x: _sigmoid_float32(x), lambda x: 1 / (1 + math.exp(-x)))
)

for _function in recurrence.COMPOSED:
    inlined(_function)
