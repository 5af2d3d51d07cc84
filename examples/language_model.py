"""A language model: embedding, SRU, LSTM or GRU, and an output layer that shares the embedding's matrix."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import InputError
from torch import Tensor, nn

# What is carried from one piece of text to the next, each `(layers, B, hidden)`: c of an SRU, h of a GRU, h and c of
# an LSTM. None stands for zeros.
State = tuple[Tensor, ...] | None


@dataclass
class Shape:
    """What decides the parameters of a model and how it computes.

    Args:
        encoder: "sru", "lstm" or "gru".
        hidden: Units of a layer, and features of the embedding.
        layers: Number of layers.
        dropout: Probability of dropping a feature of the embedding, of a layer's output, of the last output.
        rnn_dropout: Probability of dropping a feature of the input of a layer's matrix products.
        sru_version, highway_bias: `version` and `highway_bias` of `numsru.SRU`.
    """

    encoder: str
    hidden: int
    layers: int
    dropout: float
    rnn_dropout: float
    sru_version: int
    highway_bias: float


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x, `(L, B, features)`, with one mask for all steps (Gal and Ghahramani, arXiv:1512.05287)."""
    return x * F.dropout(x.new_ones(x.shape[1:]), p) if training and p > 0 else x


class Simple(nn.Module):
    """`numsru.SRU` behind the interface of all encoders: `(L, B, hidden)` and state to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        try:
            from numsru import SRU
        except ModuleNotFoundError as missing:
            raise InputError(f"no module {missing.name}: run `pip install -e .` in the folder above examples") from None
        self.rnn = SRU(
            shape.hidden,
            shape.hidden,
            shape.layers,
            dropout=shape.dropout,
            rnn_dropout=shape.rnn_dropout,
            version=shape.sru_version,
            highway_bias=shape.highway_bias,
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h, c_n = self.rnn(x, None if state is None else state[0])
        return h, (c_n,)


class Gated(nn.Module):
    """Layers of LSTM or GRU with the dropout that `numsru.SRU` has: one mask for all steps."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout, self.rnn_dropout = shape.dropout, shape.rnn_dropout
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[shape.encoder]
        self.layers = nn.ModuleList(kind(shape.hidden, shape.hidden) for _ in range(shape.layers))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        finals = []
        for i, layer in enumerate(self.layers):
            if i:
                x = locked_dropout(x, self.dropout, self.training)
            initial = None if state is None else tuple(part[i : i + 1] for part in state)
            lone = isinstance(layer, nn.GRU)
            x, final = layer(
                locked_dropout(x, self.rnn_dropout, self.training), initial[0] if lone and initial else initial
            )
            finals.append((final,) if lone else final)
        return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))


class LanguageModel(nn.Module):
    """Scores of the next symbol after each of `symbols`.

    Inputs: `symbols`, `(L, B)` int64, and the state after the symbols before. Outputs: `(L, B, symbols)` and the state.
    """

    def __init__(self, symbols: int, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.embedding = nn.Embedding(symbols, shape.hidden)
        self.encoder = Simple(shape) if shape.encoder == "sru" else Gated(shape)
        self.bias = nn.Parameter(torch.zeros(symbols))
        # Small, because the same matrix makes the scores: the first loss is then that of a uniform guess.
        nn.init.normal_(self.embedding.weight, std=shape.hidden**-0.5)

    def forward(self, symbols: Tensor, state: State = None) -> tuple[Tensor, State]:
        x = locked_dropout(self.embedding(symbols), self.dropout, self.training)
        h, state = self.encoder(x, state)
        h = locked_dropout(h, self.dropout, self.training)
        return F.linear(h, self.embedding.weight, self.bias), state


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def hidden_within(parameters: int, build: Callable[[int], nn.Module]) -> int:
    """The largest hidden size, a multiple of 4, with which `build` makes a model of at most `parameters`."""

    # The number is a polynomial of second degree in the hidden size: three small models determine it.
    with torch.random.fork_rng(devices=[]):
        one, two, three = (count_parameters(build(4 * fours)) for fours in (1, 2, 3))

    def size(fours: int) -> int:
        return one + (two - one) * (fours - 1) + (three - 2 * two + one) * (fours - 1) * (fours - 2) // 2

    fours = bisect.bisect_right(range(1, 2**12), parameters, key=size)
    if fours == 0:
        raise InputError(f"the smallest model has {one:,} parameters: give --parameters a larger number")
    return 4 * fours


def cross_entropy(scores: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Of scores `(…, symbols)` and targets `(…)`, in nats; never in 16 bits, in which sums over symbols are coarse."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: LanguageModel, numbers: Tensor, precision: Callable[[], torch.autocast]) -> float:
    """Mean cross-entropy, in nats, of each symbol of the text after all symbols before it.

    The text is read as one stream, in pieces, with the state carried on.
    """
    model.eval()
    total, state = torch.zeros((), dtype=torch.float64), None
    for start in range(0, len(numbers) - 1, 512):
        piece = numbers[start : start + 513]
        with precision():
            scores, state = model(piece[:-1, None], state)
        total += cross_entropy(scores, piece[1:], "sum").double().cpu()
    return total.item() / (len(numbers) - 1)


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: list[int], count: int, temperature: float, forbidden: int, seed: int
) -> list[int]:
    """Draw `count` symbols, one after another, that follow the prompt.

    Args:
        prompt: Numbers of at least one symbol.
        temperature: Scores are divided by it: below 1 the likely symbols become likelier; 0 takes the likeliest.
        forbidden: A symbol that is never drawn.
    """
    model.eval()
    device = model.bias.device
    generator = torch.Generator().manual_seed(seed)
    drawn, state, following = [], None, torch.tensor(prompt, device=device)[:, None]
    for _ in range(count):
        scores, state = model(following, state)
        last = scores[-1, 0].float().cpu()
        last[forbidden] = -torch.inf
        if temperature == 0:
            symbol = last.argmax()
        else:
            symbol = torch.multinomial((last / temperature).softmax(0), 1, generator=generator)[0]
        drawn.append(int(symbol))
        following = symbol.view(1, 1).to(device)
    return drawn
