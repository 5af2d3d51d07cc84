"""Memory that `torch.empty` hands out holds NaN in every test, so that nothing relies on what it happens to hold.

Tests that run side by side share the cores.
"""

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

# Threads of OpenMP that wait keep a core busy, which others need: the tests of layers, in two processes on two cores,
# took 60 seconds, and take 15. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Compilers, of numsru and of torch, make very many objects: searching them for cyclic garbage took a tenth of the time.
gc.set_threshold(50_000)


def _poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        with torch.no_grad():
            return result.fill_(float("nan")) if result.is_floating_point() else result

    return wrapper


# torch looks once for the functions that `with torch.device(...)` acts on: let it do so before some are replaced.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
