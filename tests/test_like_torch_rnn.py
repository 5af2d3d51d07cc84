"""What holds of `torch.nn.GRU` and is to hold of `numsru.SRU` in its place: forms of input, states, errors, copies."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from numsru import SRU, SRUCell

SIZES = pytest.mark.parametrize("num_layers", [1, 3])
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])


def both(*args, **kwargs):
    torch.manual_seed(0)
    return SRU(*args, **kwargs), nn.GRU(*args, **kwargs)


def shapes(results):
    return [tuple(a.shape) for a in results]


@SIZES
@DIRECTIONS
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("size", [(7, 3, 6), (1, 1, 6), (7, 6)], ids=str)
def test_outputs_have_the_shapes_of_gru(num_layers, bidirectional, batch_first, size):
    rnn, gru = both(6, 4, num_layers, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(size)
    assert shapes(rnn(x)) == shapes(gru(x))
    state = gru(x)[1]
    assert shapes(rnn(x, state)) == shapes(gru(x, state))


@DIRECTIONS
@pytest.mark.parametrize("bias", [False, True])
def test_constructor_takes_the_positional_arguments_of_gru(bias, bidirectional):
    args = (6, 4, 2, bias, True, 0.25, bidirectional)
    rnn, gru = both(*args)
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    assert [getattr(rnn, n) for n in names] == [getattr(gru, n) for n in names] == [*args]


@SIZES
@DIRECTIONS
def test_missing_state_is_zeros(num_layers, bidirectional):
    rnn, _ = both(6, 4, num_layers, bidirectional=bidirectional)
    x = torch.randn(7, 3, 6)
    zeros = torch.zeros(num_layers * (1 + bidirectional), 3, 4)
    torch.testing.assert_close(rnn(x, zeros), rnn(x), rtol=0, atol=0)


@DIRECTIONS
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input_is_one_row_of_a_batch(batch_first, bidirectional):
    rnn, _ = both(6, 4, 2, batch_first=batch_first, bidirectional=bidirectional)
    x, state = torch.randn(7, 6), torch.randn(2 * (1 + bidirectional), 4)
    batch = x.unsqueeze(0 if batch_first else 1)
    output, c_n = rnn(batch, state.unsqueeze(1))
    torch.testing.assert_close(rnn(x, state), (output.squeeze(0 if batch_first else 1), c_n.squeeze(1)))


@SIZES
@DIRECTIONS
def test_last_outputs_belong_to_the_final_states(num_layers, bidirectional):
    """Only the reset gate and the highway lie between them: without these, output and state are one."""
    rnn = SRU(6, 4, num_layers, bidirectional=bidirectional, highway=False, nonlinearity="identity")
    with torch.no_grad():
        getattr(rnn, f"bias_l{num_layers - 1}")[:, 1] = 100  # a reset gate that is open
    output, c_n = rnn(torch.randn(7, 3, 6))
    torch.testing.assert_close(c_n[-1], output[0, :, 4:] if bidirectional else output[-1])
    if bidirectional:
        torch.testing.assert_close(c_n[-2], output[-1, :, :4])


@DIRECTIONS
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_packed_in_any_order_come_back_in_it(batch_first, bidirectional):
    rnn, gru = both(6, 4, 2, batch_first=batch_first, bidirectional=bidirectional)
    sequences = [torch.randn(n, 6) for n in (2, 7, 1, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    output, c_n = rnn(packed)
    expected_form, _ = gru(packed)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        torch.testing.assert_close(getattr(output, field), getattr(expected_form, field))
    padded, lengths = pad_packed_sequence(output)
    for b, sequence in enumerate(sequences):
        alone, c_alone = SRU.forward(rnn, sequence)
        torch.testing.assert_close(padded[: lengths[b], b], alone)
        torch.testing.assert_close(c_n[:, b], c_alone)


def test_states_go_with_the_rows_of_a_packed_sequence():
    rnn, _ = both(6, 4, 2)
    sequences, state = [torch.randn(n, 6) for n in (2, 7, 1)], torch.randn(2, 3, 4)
    _, c_n = rnn(pack_sequence(sequences, enforce_sorted=False), state)
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(c_n[:, b], rnn(sequence, state[:, b])[1])


def test_sorted_and_unsorted_packing_agree():
    rnn, _ = both(6, 4)
    sequences = sorted((torch.randn(n, 6) for n in (5, 5, 2)), key=len, reverse=True)
    padded, lengths = pad_sequence(sequences), [len(s) for s in sequences]
    results = [rnn(pack_padded_sequence(padded, lengths, enforce_sorted=e)) for e in (True, False)]
    torch.testing.assert_close(results[0][0].data, results[1][0].data, rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


BAD = {
    "too few dimensions": (lambda rnn: rnn(torch.randn(6)), "2 or 3 dimensions"),
    "too many dimensions": (lambda rnn: rnn(torch.randn(2, 7, 3, 6)), "2 or 3 dimensions"),
    "features": (lambda rnn: rnn(torch.randn(7, 3, 5)), "input_size = 6"),
    "state's batch": (lambda rnn: rnn(torch.randn(7, 3, 6), torch.zeros(2, 2, 4)), r"\(2, 3, 4\), got \(2, 2, 4\)"),
    "state's layers": (lambda rnn: rnn(torch.randn(7, 3, 6), torch.zeros(1, 3, 4)), r"\(2, 3, 4\), got \(1, 3, 4\)"),
    "state's units": (lambda rnn: rnn(torch.randn(7, 3, 6), torch.zeros(2, 3, 5)), r"\(2, 3, 4\), got \(2, 3, 5\)"),
    "batched state": (lambda rnn: rnn(torch.randn(7, 6), torch.zeros(2, 1, 4)), r"\(2, 4\), got \(2, 1, 4\)"),
    "unbatched state": (lambda rnn: rnn(torch.randn(7, 3, 6), torch.zeros(2, 4)), r"\(2, 3, 4\), got \(2, 4\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_both_refuse_wrong_shapes(name):
    call, message = BAD[name]
    rnn, gru = both(6, 4, 2)
    with pytest.raises(ValueError, match=message):
        call(rnn)
    with pytest.raises((ValueError, RuntimeError)):
        call(gru)


@pytest.mark.parametrize("size", [(3, 5), (5,), (2, 3, 6)], ids=str)
def test_both_cells_refuse_wrong_shapes(size):
    for cell in (SRUCell(6, 4), nn.GRUCell(6, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            cell(torch.randn(size))


def test_flattening_parameters_changes_nothing():
    rnn, x = SRU(6, 4, 2, bidirectional=True), torch.randn(7, 3, 6)
    before, addresses = rnn(x), [p.data_ptr() for p in rnn.parameters()]
    assert rnn.flatten_parameters() is None
    torch.testing.assert_close(rnn(x), before, rtol=0, atol=0)
    assert [p.data_ptr() for p in rnn.parameters()] == addresses


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_copy_after_a_change_of_dtype_computes_the_same(dtype, way):
    rnn, x = SRU(6, 4, 2, layer_norm="post"), torch.randn(7, 3, 6)
    rnn(x)
    rnn.to(dtype)
    other, x = way(rnn), x.to(dtype)
    assert all(p.dtype == dtype for p in other.parameters())
    torch.testing.assert_close(other(x), rnn(x), rtol=0, atol=0)
    other.float()
    assert other(x.float())[0].dtype == torch.float32
    assert rnn(x)[0].dtype == dtype


def test_a_module_made_on_the_meta_device_can_be_filled():
    rnn, x = SRU(6, 4, 2, version=2), torch.randn(7, 3, 6)
    other = SRU(6, 4, 2, version=2, device="meta").to_empty(device="cpu")
    other.load_state_dict(rnn.state_dict())
    torch.testing.assert_close(other(x), rnn(x), rtol=0, atol=0)
    assigned = SRU(6, 4, 2, version=2, device="meta")
    assigned.load_state_dict(rnn.state_dict(), assign=True)
    torch.testing.assert_close(copy.deepcopy(assigned)(x), rnn(x), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_copy_after_a_move_to_a_gpu_computes_the_same():
    rnn, x = SRU(6, 4, 2), torch.randn(7, 3, 6)
    expected = rnn(x)
    rnn.cuda()
    for other in (rnn, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        received = tuple(a.cpu() for a in other(x.cuda()))
        torch.testing.assert_close(received, expected)
    torch.testing.assert_close(rnn.cpu()(x), expected)


@SIZES
@DIRECTIONS
def test_frozen_parameters_get_no_gradient(num_layers, bidirectional):
    rnn, x = SRU(6, 4, num_layers, bidirectional=bidirectional), torch.randn(7, 3, 6)
    rnn.weight_l0.requires_grad_(False)
    rnn(x)[0].sum().backward()
    assert rnn.weight_l0.grad is None
    assert rnn.bias_l0.grad.abs().sum() > 0
    rnn.requires_grad_(False)
    assert not rnn(x)[0].requires_grad
    assert rnn(x.requires_grad_())[0].requires_grad


def test_the_initial_state_may_be_called_hx():
    rnn, cell, x, c = SRU(3, 4), SRUCell(3, 4), torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    torch.testing.assert_close(rnn(x, hx=c), rnn(x, c), rtol=0, atol=0)
    torch.testing.assert_close(cell(x[0], hx=c[0]), cell(x[0], c[0]), rtol=0, atol=0)
    for module, args in ((rnn, (x, c)), (cell, (x[0], c[0]))):
        with pytest.raises(TypeError, match="and hx are two names of one argument"):
            module(*args, hx=args[1])


def test_batch_first_is_a_bool():
    with pytest.raises(TypeError, match=r"batch_first must be a bool, got 0\.5"):
        SRU(3, 4, 2, True, 0.5)
