"""Which of the implementations of the recurrence runs a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import cpu_kernels

BACKENDS = ("auto", "reference")


class _Chosen(threading.local):
    def __init__(self) -> None:  # called in every thread; torch.compile guards on the attribute of the instance
        self.name = "auto"


_chosen = _Chosen()  # not a ContextVar, which torch.compile cannot read


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose what computes the recurrences inside a `with` statement, or a function that this decorates.

    The choice is made in the forward pass, for the current thread; the backward pass of a recurrence follows it
    wherever it is started.

    Args:
        name: "reference": :func:`numsru.reference.sru_recurrence`, plain torch operations, one step after the other.
            Slow, and differentiable as often as you like, in reverse and in forward mode. "auto", the default
            everywhere: kernels where there are some for the device of the tensors, and the reference elsewhere.

    Raises:
        ValueError: For any other name.

    Example:
        >>> rnn, x = numsru.SRU(10, 20), torch.randn(5, 3, 10, requires_grad=True)
        >>> with numsru.use_backend("reference"):
        ...     output, c_n = rnn(x)
        >>> (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        >>> grad.square().sum().backward()
    """
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    before = _chosen.name
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


def kernels_for(device_type: str) -> ModuleType | None:
    """The kernels for tensors on a device; None where there are none."""
    if device_type == "cpu":
        return cpu_kernels
    if device_type == "cuda":
        try:
            from . import cuda_kernels  # imported late: numba.cuda is of no use to those without a GPU
        except (ImportError, RuntimeError) as error:
            error.add_note(
                "numsru needs NVIDIA's libraries for its CUDA kernels: pip install 'numsru[cuda13]' or [cuda12]"
            )
            raise
        return cuda_kernels
    return None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What states are kept in, and gates computed in, for a `u` of some dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a device, of a type that may not know it."""
    known = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def is_exporting() -> bool:
    """Whether `torch.export` is reading the program.

    The flag itself: in torch 2.8 and 2.11, `torch.compile` takes `torch.compiler.is_exporting()` for true too.
    """
    return torch.compiler._is_exporting_flag


def uses_reference() -> bool:
    """Whether plain torch operations are wanted: chosen, for derivatives in forward mode, in an exported program."""
    return _chosen.name == "reference" or forward_ad._current_level >= 0 or is_exporting()


def uses_operators(a: Tensor) -> bool:
    """Whether a call with the tensor `a` has to go through torch's dispatcher, which costs more than to go past it.

    There compilers, dispatch modes and subclasses of Tensor take part.
    """
    return is_compiling() or type(a) not in _PLAIN or _count_dispatch_modes() > 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, which a node of autograd has to know how to handle."""
    return _is_transformed()


def may_look(a: Tensor) -> bool:
    """Whether a call with the tensor `a` may look at the values of tensors on the host."""
    return not (is_compiling() or type(a) not in _PLAIN or _count_dispatch_modes() > 0 or _is_transformed())


def takes_shortcuts(a: Tensor) -> bool:
    """Whether kernels may be run on the memory of `a`, past torch: nobody else has to see it.

    The questions above once more, in one function: this is asked at every call of a module.
    """
    return not (
        is_compiling()
        or type(a) not in _PLAIN
        or _count_dispatch_modes() > 0
        or _is_transformed()
        or _chosen.name != "auto"
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_transformed = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def check_not_traced() -> None:
    if _tracing_state() is not None:
        raise RuntimeError(f"torch.jit.trace cannot record numsru's kernels: {INSTEAD_OF_TORCHSCRIPT}")


INSTEAD_OF_TORCHSCRIPT = (
    "use torch.compile, torch.export.export or torch.onnx.export(..., dynamo=True), "
    "or, for a fixed length, trace inside numsru.use_backend('reference')"
)
