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
    """The kernels for tensors on a device; None where there are none. On "meta", nothing is computed anyway."""
    if device_type in ("cpu", "meta"):
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


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a dispatch mode or a subclass of Tensor has to see a call with these tensors."""
    return is_compiling() or not PLAIN.issuperset(map(type, tensors)) or _count_dispatch_modes() > 0


def uses_operators(a: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with these tensors has to go through torch's dispatcher, which costs more than to go past it."""
    return a.is_meta or _is_watched(a, *others)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, which a node of autograd has to know how to handle."""
    return _is_transformed()


def may_look(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors may look at the values of tensors on the host."""
    return not (_is_watched(*tensors) or _is_transformed())


def takes_shortcuts(a: Tensor, state: Tensor | None) -> bool:
    """Whether kernels may be run on the memory of these tensors, past torch: nobody else has to see it.

    The questions above once more, in one function: this is asked at every call of a module.
    """
    return not (
        is_compiling()
        or type(a) not in PLAIN
        or type(state) not in PLAIN
        or _count_dispatch_modes() > 0
        or _is_transformed()
        or _chosen.name != "auto"
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


# Types of tensors that have memory of their own, unlike most subclasses of Tensor; and that of no tensor.
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_transformed = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_tracing_state = torch._C._get_tracing_state


def check_gradients(*grads: Tensor) -> None:
    """Refuse gradients that kernels cannot read, although forward took plain tensors."""
    for grad in grads:
        if _is_batched(grad):
            raise RuntimeError(
                "numsru's kernels compute no batched gradients (is_grads_batched=True, vectorize=True): use "
                "torch.func.jacrev, or call the module inside numsru.use_backend('reference')"
            )
        # A subclass with a dispatch of its own may have no memory.
        if type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"gradients must be plain tensors as the outputs are, got {type(grad).__name__}")


def check_not_traced() -> None:
    if _tracing_state() is not None:
        raise RuntimeError(f"torch.jit.trace cannot record numsru's kernels: {INSTEAD_OF_TORCHSCRIPT}")


INSTEAD_OF_TORCHSCRIPT = (
    "use torch.compile, torch.export.export or torch.onnx.export(..., dynamo=True), "
    "or, for a fixed length, trace inside numsru.use_backend('reference')"
)
