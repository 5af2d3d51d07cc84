"""What the compiled CUDA kernels move and execute, counted in the emulator: bytes, sectors, instructions."""

import cuda_without_gpu
import pytest
import torch

from numsru import cuda_kernels, cuda_launch
from numsru.recurrence import HIGHWAY, IDENTITY, LENGTHS, NO_SKIP, SELU, SKIP_INPUT, SKIP_PROJECTED, Options

if reason := cuda_without_gpu.why_not("emulator"):
    pytest.skip(reason, allow_module_level=True)

float32, bfloat16 = torch.float32, torch.bfloat16
L, B, H = 512, 2, 96  # all tiles are full, rows and blocks begin at sectors
PLAIN = Options(save_c=True)
PROJECTED = Options(1, SELU, HIGHWAY, SKIP_PROJECTED, LENGTHS, has_mask_c=True, save_c=True)
BARE = Options(nonlinearity=IDENTITY, skip=NO_SKIP, save_c=True)
VERSION_2 = Options(2, IDENTITY, save_c=True)

# Thread instructions for each element, forward and backward: a tenth above what they are.
CASES = [
    pytest.param(PLAIN, 1, float32, (75, 126), id="plain-float32"),
    pytest.param(PLAIN, 1, bfloat16, (78, 130), id="plain-bfloat16"),
    pytest.param(PLAIN, 2, float32, (75, 126), id="plain-bidirectional-float32"),
    pytest.param(PROJECTED, 2, float32, (78, 141), id="projected-lengths-bidirectional-float32"),
    pytest.param(BARE, 1, float32, (56, 94), id="no_highway-float32"),
    pytest.param(VERSION_2, 1, float32, (54, 101), id="version_2-float32"),
    pytest.param(VERSION_2, 1, bfloat16, (63, 112), id="version_2-bfloat16"),
]


@pytest.fixture
def counted(monkeypatch):
    """Counts of every launch."""
    counts = []

    def launch(kernel, device, blocks, block, *arguments):
        counts.append(cuda_without_gpu.run_emulator(kernel, blocks, block, arguments, stats=True).stats)

    monkeypatch.setattr(cuda_launch, "launch", launch)
    return counts


def run_both(options, D, dtype):
    """Forward and backward of random arrays."""
    torch.manual_seed(0)

    def randn(*shape, dtype=None):
        return torch.randn(*shape).to(dtype or real)

    real = torch.float64 if dtype == torch.float64 else float32
    x = randn(L, B, D * H, dtype=dtype) if options.skip == SKIP_INPUT else None
    weight_c = randn(D, 2, H) if options.version == 2 else None
    mask_c = randn(B, D * H) if options.has_mask_c else None
    valid = torch.full((B,), L) if options.padding == LENGTHS else None
    u, bias = randn(L, B, D, options.parts, H, dtype=dtype), randn(D, 2, H)
    _, _, saved = cuda_kernels.forward(options, u, x, bias, weight_c, None, mask_c, valid, 1.0, L, B)
    grads = randn(L, B, D * H, dtype=dtype), randn(B, D * H)
    cuda_kernels.backward(options, u, x, bias, weight_c, mask_c, valid, 1.0, L, B, saved, *grads)


@pytest.mark.parametrize(("options", "D", "dtype", "instructions"), CASES)
def test_kernels_move_no_more_than_they_must_in_few_instructions(counted, options, D, dtype, instructions):
    run_both(options, D, dtype)
    elements = L * B * D * H
    inputs = options.parts + (options.skip == SKIP_INPUT)
    arrays = inputs + 1, 2 * inputs + 1  # forward reads its inputs and writes h; backward also reads dL/dh
    assert len(counted) == 2
    for stats, count, budget in zip(counted, arrays, instructions, strict=True):
        tiles = L // (64 if options.version == 1 else 8)
        least = elements * count * dtype.itemsize + 4 * tiles * B * D * H  # with a state for every tile
        assert least <= stats.global_load_bytes + stats.global_store_bytes <= 1.05 * least
        assert stats.coalescing >= 0.95
        assert stats.instructions <= budget * elements


@pytest.mark.parametrize(("D", "dtype", "bytes_at_once"), [(1, float32, 4), (2, bfloat16, 4), (1, torch.float64, 8)])
def test_threads_load_words(counted, D, dtype, bytes_at_once):
    run_both(PLAIN, D, dtype)
    for stats in counted:
        moved = stats.global_load_bytes + stats.global_store_bytes
        assert moved / stats.global_requests >= 0.95 * 32 * bytes_at_once  # of a warp
