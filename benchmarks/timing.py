"""Clocks, alternation of contestants, and the ceilings of a device."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from numsru.products import product_by_convolution

Call = Callable[[], Any]

SAMPLE = 2e-3  # seconds that one sample lasts, so that a clock's resolution and cost do not matter
ROUNDS = (5, 200)  # fewest and most samples of a contestant
LONG_ROUND, FEWEST_LONG_ROUNDS = 0.5, 3  # a round that takes longer, in seconds, and how many of them are enough
MOST_COPIES = 256  # of a contestant's inputs


class Settings(NamedTuple):
    """How to measure. `dtype` is "float32", "tf32" or "bfloat16"; `seconds` go to each comparison."""

    device: torch.device
    dtype: str
    seconds: float
    small: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def element_size(self) -> int:
        return self.torch_dtype.itemsize

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.torch_dtype)

    def copies(self, size: int) -> int:
        """How many inputs of `size` bytes to take in turn so that a GPU's second-level cache cannot hold them."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(MOST_COPIES, 1 + math.ceil(2 * cache / size))


def seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Time of one call, the mean of several in a row: by CUDA events on a GPU, else by the wall clock."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def alternate(calls: dict[str, Call], settings: Settings) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one sample a round; each round runs all of them, in another order.

    All contestants meet the same drifts of clock rate and the same neighbours on the machine, so that samples of one
    round may be compared even where the rounds differ.
    """
    if not calls:
        return {}
    estimates = {name: seconds(call, 1, settings.device) for name, call in calls.items()}
    sample = 0 if settings.small else SAMPLE
    repeats = {name: max(1, round(sample / max(t, 1e-9))) for name, t in estimates.items()}
    fewest, most = ROUNDS
    round_takes = sum(estimates[name] * repeats[name] for name in calls)
    if round_takes > LONG_ROUND:
        fewest = FEWEST_LONG_ROUNDS
    rounds = fewest if settings.small else int(min(max(settings.seconds / round_takes, fewest), most))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(seconds(calls[name], repeats[name], settings.device))
    finally:
        gc.enable()
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of seconds per call, and how many samples there are."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "samples": len(samples)}


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """How many times as long as the base: the median over the rounds of the ratio within each."""
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def reason(error: Exception) -> str:
    """What is said of a contestant that cannot be measured: the first line of the error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compare(calls: dict[str, Call], settings: Settings, base: str) -> dict[str, dict[str, Any]]:
    """Warm up and alternate.

    Returns:
        "times", a summary of each contestant, "ratios" of its time to the base's, and "unavailable", the reason why a
        contestant cannot run.
    """
    unavailable: dict[str, str] = {}
    for name, call in calls.items():
        try:
            for _ in range(2):
                call()
        except Exception as error:  # a device, a dtype, a missing compiler: libraries have errors of their own
            if name == base:
                raise
            unavailable[name] = reason(error)
    samples = alternate({name: call for name, call in calls.items() if name not in unavailable}, settings)
    return {
        "times": {name: summary(s) for name, s in samples.items()},
        "ratios": {name: ratio(s, samples[base]) for name, s in samples.items()},
        "unavailable": unavailable,
    }


def copy_call(size: int, settings: Settings) -> Call:
    """A copy that moves `size` bytes, read and written together, or a few less."""
    source = settings.randn(max(1, size // 2 // settings.element_size))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def conv_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of x, (L, B, in), as a 1x1 convolution: on a CPU, oneDNN's product, not MKL's."""
    return product_by_convolution(x.flatten(0, 1), weight).view(*x.shape[:2], -1)


def products(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The routes to a matrix product x Wᵀ."""
    return {"F.linear": F.linear} | ({"conv 1x1": conv_product} if device.type == "cpu" else {})


def measure_ceilings(settings: Settings) -> dict[str, Any]:
    """What the device can do: bytes per second of copies by size, operations per second of a large matrix product.

    The ceiling of bandwidth, "copy_bytes_per_second", is that of the fastest copy that is too large for a cache.
    """
    on_gpu = settings.device.type == "cuda"
    copies = []
    for size in [2**i for i in (range(14, 16) if settings.small else range(20, 32 if on_gpu else 30))]:
        few = settings._replace(seconds=settings.seconds / 20)
        result = compare({"copy": copy_call(size, settings)}, few, "copy")
        copies.append({"bytes": size, "bytes_per_second": size / result["times"]["copy"]["median"]})
    # A GPU writes part of a copy back later; other processors have caches of at most a few hundred MB.
    large = 8 * torch.cuda.get_device_properties(settings.device).L2_cache_size if on_gpu else 2**29
    m, k, n = (8, 8, 8) if settings.small else (8192, 8192, 8192) if on_gpu else (4096, 1024, 3072)
    x, weight = settings.randn(m, 1, k), settings.randn(n, k)
    with torch.no_grad():
        calls = {name: partial(product, x, weight) for name, product in products(settings.device).items()}
        times = compare(calls, settings, "F.linear")["times"]
    sustained = [c["bytes_per_second"] for c in copies if c["bytes"] >= min(large, copies[-1]["bytes"])]
    rates = {name: 2 * m * k * n / t["median"] for name, t in times.items()}
    return {
        "copy": copies,
        "copy_bytes_per_second": max(sustained),
        "product_size": [m, k, n],
        "product_flops_per_second": rates,
    }
