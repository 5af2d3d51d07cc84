"""Predicted times of the CUDA kernels, so that the first run on a device confirms or refutes them.

A prediction is no measurement. It is made from what is counted without a GPU (bytes, instructions of the compiled
kernels, tiles and barriers) and from what is assumed of the device, `H200` below.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from numsru import cuda_kernels
from numsru.cuda_kernels import STORAGE, Tile, backward_kernel, forward_kernel
from numsru.recurrence import SKIP_INPUT, SKIP_PROJECTED, Options

from . import report
from .points import Point, product_flops, recurrence_bytes


class Device(NamedTuple):
    """What is assumed of a GPU. Times are in seconds."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    copy_bytes_per_second: float
    product_flops_per_second: dict[str, float]
    launch: float  # of a kernel in a graph: from the end of the one before to the first load
    load: float  # from a load to its value, under load
    barrier: float


# Published: 132 multiprocessors, 1.755 GHz boost, 4.8 TB/s, and 67, 494 and 989 TFLOP/s without sparsity. Copies were
# taken to reach 0.83 of the bandwidth, products 0.8, 0.6 and 0.65 of the rate. The latencies are those of H100s.
H200 = Device(
    "NVIDIA H200", 132, 1.755e9, 4.0e12, {"float32": 54e12, "tf32": 296e12, "bfloat16": 643e12},
    launch=2.5e-6, load=0.8e-6, barrier=0.03e-6,
)  # fmt: skip

LANES = 128  # instructions that a multiprocessor starts in a cycle, counted by thread
DIRECTIONS = ("forward", "backward")
# Machine instructions in the loop over tiles, for each element: forward, backward. By bits of a number and whether a
# tile has several chunks; disassembled for compute capability 9.0.
INSTRUCTIONS = {(32, False): (48, 87), (32, True): (56, 102), (16, True): (47, 80)}


def predict(point: Point, dtype: str, direction: str, device: Device = H200) -> dict[str, Any]:
    """Seconds of the recurrence of a point's last layer, and what they are made of."""
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    storage, make_kernel = STORAGE[torch_dtype], forward_kernel if direction == "forward" else backward_kernel
    skip = SKIP_INPUT if point.input_sizes[-1] == point.output_size else SKIP_PROJECTED
    options = Options(skip=skip, save_c=direction == "backward")  # forward is measured without gradients
    columns, lanes = point.B * point.output_size, 2 if torch_dtype.itemsize == 2 else 1
    tile = cuda_kernels.choose_tile(options, storage, point.L, columns, lanes)
    spans, span_tiles = cuda_kernels._choose_spans(options, tile, point.L, columns)
    threads, resident = cuda_kernels.launch_bounds(make_kernel, options, storage, tile, (9, 0))
    blocks = math.ceil(columns / (tile.columns * tile.lanes)) * spans
    rounds = math.ceil(blocks / (device.multiprocessors * resident))
    at_once = min(resident, math.ceil(blocks / device.multiprocessors))  # blocks of a multiprocessor

    elements = point.L * columns
    instructions = INSTRUCTIONS[storage.number.bitwidth, tile.chunks > 1][DIRECTIONS.index(direction)]
    size = recurrence_bytes(point, torch_dtype.itemsize, direction)
    if options.save_c:
        size += 4 * elements // (tile.chunks * tile.steps)  # a state for every tile
    # All blocks together: memory, and instructions. A block alone: its tiles one after the other, each of which waits
    # for its loads and at its barriers, then computes; meanwhile the blocks beside it compute.
    memory = size / device.copy_bytes_per_second
    issue = elements * instructions / (LANES * device.clock * device.multiprocessors)
    barriers = 0 if tile.chunks == 1 else DIRECTIONS.index(direction) + 1
    compute = threads * tile.steps * tile.lanes * instructions / (LANES * device.clock)
    waiting = rounds * span_tiles * max(device.load + barriers * device.barrier + compute, at_once * compute)
    launches = 1 if direction == "forward" else 2  # and the sum of the rows' gradients
    if spans > 1:  # the first of two launches reads what the states depend on, and writes nothing to speak of
        launches, waiting = launches + 1, 2 * waiting
        read = 2 if direction == "forward" else 4
        memory += read * elements * torch_dtype.itemsize / device.copy_bytes_per_second
    parts = {"memory": memory, "instructions": issue, "waiting": waiting}
    return {
        "seconds": launches * device.launch + max(parts.values()),
        "bytes": size,
        "tile": tile._asdict(),
        "blocks": blocks,
        "bound_by": max(parts, key=parts.__getitem__),
        **parts,
    }


def run(
    points: list[Point], dtypes: tuple[str, ...] = ("float32", "bfloat16"), device: Device = H200
) -> dict[str, Any]:
    """Predictions for the recurrence alone and for a layer of it, its products added."""
    entries = []
    for dtype in dtypes:
        for point in points:
            for direction in DIRECTIONS:
                entry = {"point": point.name, "dtype": dtype, "pass": direction} | predict(
                    point, dtype, direction, device
                )
                products = product_flops(point, training=False) * (1 if direction == "forward" else 2)
                entry["products"] = products / device.product_flops_per_second[dtype]
                entries.append(entry)
    return {"kind": "prediction", "device": device._asdict(), "recurrence": entries}


def measured(folder: Path, device: Device = H200) -> dict[tuple[str, str, str], float]:
    """Seconds that were measured on this device, by point, dtype and pass; empty where there is no result."""
    found = {}
    for path in sorted(folder.glob("cuda_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["machine"].get("gpu", {}).get("name", "").startswith(device.name):
            for entry in (e for e in result["recurrence"] if "numsru" in e["times"]):
                key = entry["point"], result["settings"]["dtype"], entry["pass"]
                found[key] = entry["times"]["numsru"]["median"]
    return found


def tables(result: dict[str, Any], known: dict[tuple[str, str, str], float]) -> str:
    """The predictions as text, beside what was measured."""
    rows = []
    for e in result["recurrence"]:
        time = known.get((e["point"], e["dtype"], e["pass"]))
        tile = Tile(**e["tile"])
        rows.append([
            e["point"], e["dtype"], e["pass"], f"{e['bytes'] / 1e6:.1f}", f"{tile.chunks}x{tile.steps}x{tile.lanes}",
            str(e["blocks"]), report.number(e["memory"] * 1e6), report.number(e["instructions"] * 1e6),
            report.number(e["waiting"] * 1e6), report.number(e["seconds"] * 1e6),
            report.number(e["products"] * 1e6), report.number(time * 1e6) if time else "",
        ])  # fmt: skip
    header = [
        "point", "dtype", "pass", "MB", "tile", "blocks", "memory, µs", "instructions, µs", "waiting, µs",
        "predicted, µs", "products, µs", "measured, µs",
    ]  # fmt: skip
    return report.table(header, rows)
