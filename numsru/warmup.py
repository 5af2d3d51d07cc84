"""Compile kernels before they are needed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .nn import SRU


def warmup(module: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
    """Compile all kernels that calls of `module(*args, **kwargs)` need, so that no such call has to wait for them.

    The module is copied and the copy run with gradients and without, in training and in evaluation mode. The module
    itself, its gradients and the state of the random generators are left as they are. In inference mode, and with
    tensors made there, the copy runs without gradients alone. Do this before a stream is captured in a CUDA graph:
    nothing can be compiled while it is.

    Which kernels a call needs depends on options and dtypes, on which arguments are there and, on a GPU, roughly on
    the sizes. Compiled kernels are kept on disk for later processes.

    Args:
        module: What is going to be called: an :class:`numsru.SRU`, or a model with some inside. Default: all that
            `numsru.SRU` needs in eager code on the CPU for float32, without options other than `version` and padding.
        args, kwargs: Arguments of such a call.

    Raises:
        TypeError: Without a module in front of the arguments. What the module itself raises passes through.

    Example:
        >>> rnn = numsru.SRU(10, 20)
        >>> numsru.warmup(rnn, torch.randn(5, 3, 10))
    """
    if module is None:
        if args or kwargs:
            raise TypeError("expected a module in front of the arguments of its call")
        for version in (1, 2):
            rnn = SRU(2, 4, num_layers=2, version=version, device="cpu")
            x, lengths = torch.zeros(2, 2, 2), torch.tensor([2, 1])
            mask_pad = torch.tensor([[False, False], [True, False]])
            for padding in ({}, {"lengths": lengths}, {"mask_pad": mask_pad}):
                warmup(rnn, x, **padding)
        return
    if not isinstance(module, nn.Module):
        raise TypeError("expected a module in front of the arguments of its call")
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    copied = copy.deepcopy(module)
    inferred = torch.is_inference_mode_enabled() or any(a.is_inference() for a in _tensors([args, kwargs]))
    with torch.random.fork_rng(sorted(d for d in devices if d is not None)):
        for training in (True, False):
            copied.train(training)
            with torch.no_grad():
                copied(*args, **kwargs)
            if inferred:
                continue
            with torch.enable_grad():
                outputs = [a for a in _tensors(copied(*args, **kwargs)) if a.requires_grad]
            inputs = [a for a in (*copied.parameters(), *_tensors([args, kwargs])) if a.requires_grad]
            if outputs and inputs:  # not `backward`, which would give the arguments a gradient
                torch.autograd.grad(outputs, inputs, [torch.zeros_like(a) for a in outputs], allow_unused=True)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in what a module takes or returns."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [a for v in value for a in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []
