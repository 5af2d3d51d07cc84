"""What the tests of both training scripts ask of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def check_files(out: Path, encoder: str, of_an_epoch: set[str]) -> dict[str, Any]:
    """Check what a finished run has left in its folder, and return its metrics."""
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["arguments"]["encoder"] == encoder
    weights = load_file(out / "weights.safetensors")
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert set(metrics["epochs"][0]) == of_an_epoch
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "curves.png", "metrics.json", "vocabulary.json", "weights.safetensors",
    ]  # fmt: skip
    return metrics


def read_error(capsys: Any, main: Callable[[list[str]], int], *argv: Any) -> tuple[str, str]:
    """What a run that ends with exit status 2 prints, and the one line that it leaves on stderr."""
    assert main([str(argument) for argument in argv]) == 2
    written = capsys.readouterr()
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    return written.out, written.err
