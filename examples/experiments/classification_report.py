"""The page of the comparison of encoders."""

import json
from pathlib import Path
from typing import Any


def read(run: Path) -> dict[str, Any]:
    """The figures of a run, finished or not."""
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics
