"""Run the CPU kernels as plain Python, and check what compiled code cannot: every access to memory.

An access must be to an element of some array of the launch. What a task writes no other task may touch. What is written
under one alias scope may not be touched under another: LLVM is told that nobody does, and relies on it.
"""

import bisect
import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from numsru import cpu_kernels
from numsru.cpu_intrinsics import BFLOAT16

IN_MEMORY = {
    np.uint8: ctypes.c_uint8, np.int64: ctypes.c_int64, np.float32: ctypes.c_float, np.float64: ctypes.c_double,
    np.float16: ctypes.c_uint16, BFLOAT16: ctypes.c_uint16,
}  # fmt: skip
OF_16_BITS = {np.float16: torch.float16, BFLOAT16: torch.bfloat16}
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Memory:
    """The arrays of a launch and what its tasks did to each address. Its methods stand in for `cpu_intrinsics`."""

    def __init__(self) -> None:
        self.arrays: list[torch.Tensor] = []
        self.errors: list[Exception] = []
        self.bounds: list[tuple[int, int]] = []  # of the arrays: the first byte, and that behind the last
        self.touched: dict[int, set[tuple[int, int]]] = defaultdict(set)  # by which tasks, under which scopes
        self.written: set[int] = set()
        self.thread = threading.local()  # .task, .words: those at work
        self.lock = threading.Lock()

    def launch(self, run: Callable[..., None], *arguments: Any) -> None:
        self.bounds = sorted((a.data_ptr(), a.data_ptr() + a.nbytes) for a in self.arrays)
        self.touched.clear()
        self.written.clear()
        run(*arguments)
        self.arrays.clear()
        for error in self.errors:
            raise error
        shared = {address: self.touched[address] for address in self.written if len(self.touched[address]) > 1}
        assert not shared, f"written, and touched by several tasks or under several scopes: {shared}"

    def compile(self, function: Callable[[int], None], options: Any, storage: Any) -> Any:
        def call(words: int) -> None:
            self.thread.words = words
            try:
                function(words)
            except Exception as error:  # which ctypes would print and forget
                self.errors.append(error)

        kernel = KERNEL(call)
        return cpu_kernels._Kernel(ctypes.cast(kernel, ctypes.c_void_p).value or 0, kernel, kernel)

    def element(self, address: int, index: int, dtype: Any, scope: int) -> Any:
        kind = IN_MEMORY[dtype]
        size = ctypes.sizeof(kind)
        address += index * size
        start, end = self.bounds[max(0, bisect.bisect(self.bounds, (address, 2**64)) - 1)]
        if not start <= address <= end - size or (address - start) % size:
            raise IndexError(f"no array has an element at {address:#x}")
        self.touched[address].add((self.thread.task, scope))
        return kind.from_address(address)

    def load(self, address: int, index: int, dtype: Any, scope: int) -> Any:
        if address == self.thread.words and 0 <= index < 27:
            return IN_MEMORY[dtype].from_address(address + 8 * index).value
        value = self.element(address, index, dtype, scope).value
        if dtype in OF_16_BITS:
            return np.float32(torch.tensor(value, dtype=torch.uint16).view(OF_16_BITS[dtype]).item())
        return value if dtype in (np.uint8, np.int64) else dtype(value)

    def store(self, address: int, index: int, value: Any, dtype: Any, scope: int) -> None:
        element = self.element(address, index, dtype, scope)
        if dtype in OF_16_BITS:
            value = torch.tensor(float(value)).to(OF_16_BITS[dtype]).view(torch.uint16).item()
        element.value = value
        self.written.add(ctypes.addressof(element))

    def fetch_add(self, address: int, increment: int) -> int:
        count = ctypes.c_int64.from_address(address)
        with self.lock:
            self.thread.task, count.value = count.value, count.value + increment
        return self.thread.task

    def address(self, array: torch.Tensor | None) -> int:
        return 0 if array is None else self.remember(array).data_ptr()

    def remember(self, array: torch.Tensor) -> torch.Tensor:
        self.arrays.append(array)
        return array


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels are Python functions."""
    memory, run, product = Memory(), cpu_kernels._run, cpu_kernels.product
    for name, function in {
        "load": memory.load, "store": memory.store, "fetch_add": memory.fetch_add, "_address": memory.address,
        "_compile": memory.compile, "prefetch": lambda address: None, "prefer_wide_vectors": lambda: None,
        "_run": lambda *arguments: memory.launch(run, *arguments),
        "product": lambda *arguments, **named: memory.remember(product(*arguments, **named)),
        "_forward_kernel": cpu_kernels._forward_kernel.__wrapped__,
        "_backward_kernel": cpu_kernels._backward_kernel.__wrapped__,
        "step_kernel": cpu_kernels.step_kernel.__wrapped__,
    }.items():  # fmt: skip
        monkeypatch.setattr(cpu_kernels, name, function)
