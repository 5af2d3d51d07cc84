"""What the CUDA kernels need beyond `numba.cuda`: the equations of `recurrence.py` compiled for a device.

In float32, sigmoid is four instructions on the GPU's approximate exponential and reciprocal: absolute error below
3e-7, the right limits at infinity, NaN stays NaN. The simulator runs `recurrence.py` as it stands and needs nothing
from here.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, cuda, types

from . import recurrence

SIMULATED = bool(getattr(cuda, "is_simulator", False)) or config.ENABLE_CUDASIM


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a plain function callable from kernels, inlined."""
    if not SIMULATED:
        _inlined(function, lambda *args: function)
    return function


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


def _inlined(function: Callable[..., Any], choose: Callable[..., Any]) -> None:
    # Inlined by LLVM: Numba's own inlining (inline="always") gives the same machine code after ten times as long.
    overload(function, target="cuda", jit_options={"forceinline": True}, strict=False)(choose)


if not SIMULATED:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic, overload

    _exp2, _reciprocal = _approximate("ex2.approx.ftz.f32"), _approximate("rcp.approx.ftz.f32")
    _MINUS_LOG2_E, _ONE = np.float32(-math.log2(math.e)), np.float32(1)

    def _sigmoid_float32(x):
        return _reciprocal(_ONE + _exp2(x * _MINUS_LOG2_E))

    def _sigmoid_float64(x):
        return 1 / (1 + math.exp(-x))

    _inlined(recurrence.sigmoid, lambda x: _sigmoid_float32 if x == types.float32 else _sigmoid_float64)
    _inlined(recurrence.tanh, lambda x: lambda x: math.tanh(x))
    _inlined(recurrence.exp, lambda x: lambda x: math.exp(x))

for _function in recurrence.COMPOSED:
    device_function(_function)
