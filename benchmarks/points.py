"""What is measured: the shapes, and the bytes and multiplications that a shape needs."""

from __future__ import annotations

import re
from typing import NamedTuple


class Point(NamedTuple):
    """A stack of recurrent layers and its input, `(L, B, input_size)`. Without `hidden_size`: of the input's size."""

    L: int
    B: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False

    @property
    def name(self) -> str:
        name = f"{self.L}x{self.B}x{self.input_size}"
        if self.hidden_size != self.input_size:
            name += f"-h{self.hidden_size}"
        return name + "-bi" * self.bidirectional + (f"-{self.num_layers}l" if self.num_layers > 1 else "")

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        return self.num_directions * self.hidden_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.L, self.B, self.input_size

    @property
    def input_sizes(self) -> list[int]:
        """Of each layer."""
        return [self.input_size] + [self.output_size] * (self.num_layers - 1)

    @property
    def product_sizes(self) -> list[int]:
        """Columns of each layer's matrix product in an SRU: a fourth part where input and output differ in size."""
        return [(3 if n == self.output_size else 4) * self.output_size for n in self.input_sizes]


def square(L: int, B: int, d: int) -> Point:
    """One layer of d units on an input of size d."""
    return Point(L, B, d, d)


def parse(name: str) -> Point:
    """The point of a name, as `Point.name` writes it.

    Raises:
        ValueError: If the name is not of that form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:-h(\d+))?(-bi)?(?:-(\d+)l)?", name)
    if match is None:
        raise ValueError(f"a point is written LxBxd, for example 128x32x256, got {name!r}")
    L, B, d, hidden, bidirectional, layers = match.groups()
    sizes = [int(L), int(B), int(d), int(hidden or d), int(layers or 1)]
    if min(sizes) < 1:
        raise ValueError(f"the sizes of a point must be at least 1, got {name!r}")
    return Point(*sizes, bidirectional is not None)


# The two panels of the original comparison, at batch size 32.
FIGURE = [square(32, 32, 256), square(128, 32, 512)]

CPU = [
    square(32, 16, 300),
    square(128, 32, 256),
    square(128, 32, 512),
    square(512, 8, 512),
    square(1024, 1, 512),
    square(35, 20, 1024),
]
CUDA = [
    *(square(L, 32, d) for d in (128, 256, 512, 1024) for L in (32, 128, 512, 1024, 4096)),
    *(square(L, B, d) for B in (1, 8) for d in (128, 256, 512, 1024) for L in (1024, 16384)),
    Point(100, 500, 512, 32, num_layers=4, bidirectional=True),  # the recurrent layers of a speech separation network
]
SMALL = [square(6, 3, 8), Point(5, 2, 8, 4, num_layers=2, bidirectional=True)]

# Compiling takes longer than everything else, so `torch.compile` is measured at these alone.
COMPILED = [square(128, 32, 256), square(128, 32, 512)]

STREAMING = [(B, d) for B in (1, 8, 32) for d in (64, 128, 256, 512, 1024)]
SMALL_STREAMING = [(1, 8), (2, 8)]


def recurrence_bytes(point: Point, element_size: int, direction: str) -> int:
    """The least that the recurrence of the last layer moves between memory and processor, in bytes.

    Forward reads u and the highway input and writes h; backward reads these and the gradient of h and writes the
    gradients of u and of the highway input. Not counted: bias, initial and final state, whose size does not grow with
    L, and states kept for backward, which a kernel may recompute.

    Args:
        element_size: Bytes of one element of u.
        direction: "forward" or "backward".
    """
    # With K = 3 matrix products the highway input is x, with K = 4 a part of u: four arrays read in either case.
    arrays = {"forward": 4 + 1, "backward": 4 + 1 + 4}[direction]
    return arrays * point.L * point.B * point.output_size * element_size


def product_flops(point: Point, training: bool) -> int:
    """Floating-point operations of the matrix products of all layers; backward has two products for each."""
    multiplications = sum(n * m for n, m in zip(point.input_sizes, point.product_sizes, strict=True))
    return 2 * point.L * point.B * multiplications * (3 if training else 1)
