"""What the compiled CUDA kernels move and execute, counted in the emulator: bytes, sectors, instructions."""

import cuda_without_gpu
import pytest
import torch

from numsru import cuda_kernels, cuda_launch
from numsru.recurrence import (
    HIGHWAY,
    IDENTITY,
    LENGTHS,
    MASK,
    NO_SKIP,
    PACKED,
    SELU,
    SKIP_INPUT,
    SKIP_PROJECTED,
    Options,
)

if reason := cuda_without_gpu.why_not("emulator"):
    pytest.skip(reason, allow_module_level=True)

float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
L, B, H = 512, 2, 96  # all tiles are full, rows and blocks begin at sectors
PLAIN = Options(save_c=True)
PROJECTED = Options(1, SELU, HIGHWAY, SKIP_PROJECTED, LENGTHS, has_mask_c=True, save_c=True)
BARE = Options(nonlinearity=IDENTITY, skip=NO_SKIP, save_c=True)
MASKED = PLAIN._replace(padding=MASK)
END_TO_END = PLAIN._replace(padding=PACKED)
VERSION_2 = Options(2, IDENTITY, save_c=True)

# Chunks of a tile, pairs of numbers or not; thread instructions for each element, forward and backward: a tenth above
# what they are.
CASES = [
    pytest.param(PLAIN, 1, float32, 1, True, (68, 123), id="plain-float32-1"),
    pytest.param(PLAIN, 1, float32, 2, True, (74, 123), id="plain-float32-2"),
    pytest.param(PLAIN, 1, float32, 4, True, (57, 97), id="plain-float32-4"),
    pytest.param(PLAIN, 1, float32, 8, True, (61, 105), id="plain-float32-8"),
    pytest.param(PLAIN, 1, float32, 8, False, (84, 140), id="plain-float32-8-single"),
    pytest.param(PLAIN, 2, float32, 16, False, (96, 165), id="plain-bidirectional-float32-16"),
    pytest.param(PLAIN, 1, bfloat16, 4, True, (67, 91), id="plain-bfloat16-4"),
    pytest.param(PLAIN, 1, bfloat16, 8, True, (54, 96), id="plain-bfloat16-8"),
    pytest.param(PLAIN, 1, bfloat16, 16, True, (61, 96), id="plain-bfloat16-16"),
    pytest.param(PLAIN, 1, float64, 4, False, (204, 261), id="plain-float64-4"),
    pytest.param(PROJECTED, 2, float32, 4, True, (59, 113), id="projected-lengths-bidirectional-float32-4"),
    pytest.param(MASKED, 1, float32, 4, True, (69, 109), id="mask-float32-4"),
    pytest.param(END_TO_END, 1, float32, 4, True, (58, 98), id="packed-float32-4"),
    pytest.param(BARE, 1, float32, 4, True, (38, 70), id="no_highway-float32-4"),
    pytest.param(VERSION_2, 1, float32, 1, False, (76, 140), id="version_2-float32"),
    pytest.param(VERSION_2, 1, bfloat16, 1, False, (84, 155), id="version_2-bfloat16"),
]


@pytest.fixture
def counted(monkeypatch):
    """Counts of every launch."""
    counts = []

    def launch(kernel, device, blocks, block, *arguments):
        counts.append(cuda_without_gpu.run_emulator(kernel, blocks, block, arguments, stats=True).stats)

    monkeypatch.setattr(cuda_launch, "launch", launch)
    cuda_kernels._plan.cache_clear()
    yield counts
    cuda_kernels._plan.cache_clear()


def run_both(options, D, dtype):
    """Forward and backward of random arrays."""
    torch.manual_seed(0)

    def randn(*shape, dtype=None):
        return torch.randn(*shape).to(dtype or real)

    real = float64 if dtype == float64 else float32
    leading = (L * B,) if options.padding == PACKED else (L, B)
    x = randn(*leading, D * H, dtype=dtype) if options.skip == SKIP_INPUT else None
    weight_c = randn(D, 2, H) if options.version == 2 else None
    mask_c = randn(B, D * H) if options.has_mask_c else None
    valid = {
        LENGTHS: torch.full((B,), L),
        MASK: torch.zeros(L, B, dtype=torch.bool),
        PACKED: torch.arange(B + 1) * L,
    }.get(options.padding)
    u, bias = randn(*leading, D, options.parts, H, dtype=dtype), randn(D, 2, H)
    _, _, saved = cuda_kernels.forward(options, u, x, bias, weight_c, None, mask_c, valid, 1.0, L, B)
    grads = randn(*leading, D * H, dtype=dtype), randn(B, D * H)
    cuda_kernels.backward(options, u, x, bias, weight_c, mask_c, valid, 1.0, L, B, saved, *grads)


def as_if_many_columns(monkeypatch, columns, chunks, pairs):
    """Let few columns be computed in the tiles that are chosen for many."""
    monkeypatch.setattr(cuda_kernels, "_WANTED_COLUMNS", chunks * columns)
    monkeypatch.setattr(cuda_kernels, "_FEW_BYTES", 0)
    if not pairs:
        monkeypatch.setattr(cuda_kernels, "_count_lanes", lambda *arguments: 1)
    monkeypatch.setattr(cuda_kernels, "_FEWEST_BLOCKS", 1)
    monkeypatch.setattr(cuda_kernels, "_ROW", 0)  # which decides by the number of blocks


@pytest.mark.parametrize(("options", "D", "dtype", "chunks", "pairs", "instructions"), CASES)
def test_kernels_move_no_more_than_they_must_in_few_instructions(
    counted, monkeypatch, options, D, dtype, chunks, pairs, instructions
):
    columns = B * D * H
    as_if_many_columns(monkeypatch, columns, chunks, pairs)
    lanes = 2 if pairs else 1
    storage = cuda_kernels.STORAGE[dtype]
    forward, backward = (cuda_kernels.choose_tile(b, options, storage, L, columns, lanes) for b in (False, True))
    assert (forward.chunks, forward.lanes) == (chunks, lanes)
    run_both(options, D, dtype)
    elements = L * columns
    inputs = options.parts + (options.skip == SKIP_INPUT)
    arrays = inputs + 1, 2 * inputs + 1  # forward reads its inputs and writes h; backward also reads dL/dh
    # A state of every tile of backward, and the mask.
    others = columns * (8 if dtype == float64 else 4) * L // (backward.chunks * backward.steps)
    others += elements // lanes * (options.padding == MASK)
    assert len(counted) == 2
    for stats, count, budget in zip(counted, arrays, instructions, strict=True):
        least = elements * count * dtype.itemsize + others
        assert least <= stats.global_load_bytes + stats.global_store_bytes <= 1.05 * least
        assert stats.coalescing >= 0.95
        assert stats.instructions <= budget * elements


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_reading_for_spans_is_all_that_they_cost(counted, monkeypatch, dtype):
    monkeypatch.setattr(cuda_kernels, "_SPLIT_STEPS", L)
    monkeypatch.setattr(cuda_kernels, "_MOST_SPANS", 2)
    run_both(PLAIN, 1, dtype)
    elements = L * B * H
    assert len(counted) == 4
    # Forward reduces candidate and forget gate; backward the reset gate and dL/dh besides.
    for stats, count in zip(counted, (2, 5, 4, 9), strict=True):
        least = elements * count * dtype.itemsize
        assert least <= stats.global_load_bytes + stats.global_store_bytes <= 1.2 * least
        assert stats.coalescing >= 0.95


@pytest.mark.parametrize(
    ("D", "dtype", "pairs", "bytes_at_once"),
    [(1, float32, True, 8), (1, float32, False, 4), (2, bfloat16, True, 4), (1, float64, False, 8)],
)
def test_threads_load_words(counted, monkeypatch, D, dtype, pairs, bytes_at_once):
    as_if_many_columns(monkeypatch, B * D * H, 4, pairs)
    run_both(PLAIN, D, dtype)
    for stats in counted:
        moved = stats.global_load_bytes + stats.global_store_bytes
        assert moved / stats.global_requests >= 0.95 * 32 * bytes_at_once  # of a warp
