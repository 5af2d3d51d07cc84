"""The classifier: an embedding, dropout, an encoder, the maximum over time, dropout, a linear layer."""

import math
from collections.abc import Callable

import torch
from common import InputError
from torch import Tensor, nn


class Recurrent(nn.Module):
    """SRU, LSTM or GRU behind the interface of all encoders: x `(L, B, in)`, lengths `(B,)` to `(L, B, out)`."""

    def __init__(
        self, kind: str, input_size: int, hidden_size: int, layers: int, dropout: float, sru_version: int = 1
    ) -> None:
        super().__init__()
        self.kind = kind
        self.output_size = hidden_size
        # Dropout acts between layers; torch warns about it where there is only one.
        between = dropout if layers > 1 else 0.0
        options = {"version": sru_version} if kind == "sru" else {}
        self.rnn = recurrent_class(kind)(input_size, hidden_size, num_layers=layers, dropout=between, **options)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "sru":
            return self.rnn(x, lengths=lengths)[0]
        # Padding is behind all valid steps and reaches none of them. To pack it away takes longer than to compute it.
        return self.rnn(x)[0]


def recurrent_class(kind: str) -> Callable[..., nn.Module]:
    if kind != "sru":
        return {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
    try:
        from numsru import SRU
    except ModuleNotFoundError as missing:
        raise InputError(f"no module {missing.name}: run `pip install -e .` in the folder above examples") from None
    return SRU


class Convolution(nn.Module):
    """Convolutions of widths 3, 4 and 5, each with `hidden_size` maps, over a step and those before it."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.output_size = 3 * hidden_size
        self.maps = nn.ModuleList(nn.Conv1d(input_size, hidden_size, width, padding=width - 1) for width in (3, 4, 5))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        channels = x.permute(1, 2, 0)
        return torch.cat([maps(channels)[:, :, : len(x)] for maps in self.maps], dim=1).relu().permute(2, 0, 1)


class Classifier(nn.Module):
    """Class scores `(B, classes)` of padded sequences `(L, B)` or `(L, B, features)` and their lengths `(B,)`."""

    def __init__(self, embedding: nn.Module, encoder: Recurrent | Convolution, classes: int, dropout: float) -> None:
        super().__init__()
        self.embedding = embedding
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(encoder.output_size, classes)

    def forward(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        steps = self.encoder(self.dropout(self.embedding(sequences)), lengths)
        padding = torch.arange(len(steps), device=steps.device)[:, None] >= lengths
        pooled = steps.masked_fill(padding[:, :, None], -math.inf).amax(0)
        return self.output(self.dropout(pooled))
