"""Train a sequence classifier: embedding, dropout, encoder, maximum over time, dropout, classifier.

Handwritten digits (the default) come with scikit-learn; the other data sets are sentences: film reviews (mr, and
sst1 and sst2 with five and two classes), product reviews (cr), opinions (mpqa), subjectivity (subj), questions (trec).

  python examples/train_classifier.py
  python examples/train_classifier.py --dataset mr --data-dir DATA --encoder sru --layers 2 --epochs 10

The last line printed is the accuracy on the test split, of the epoch that was best on the development split.
"""

import argparse
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait for others spin by default; where another program wants the cores, that makes training ten times
# slower and more. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import sentence_data
    import torch
    from matplotlib.figure import Figure
    from safetensors import torch as safetensors
    from sentence_data import Examples, InputError
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    print(
        f"error: no module {missing.name}: run `pip install -e '.[examples]'` in the folder above examples",
        file=sys.stderr,
    )
    sys.exit(2)


@dataclass
class Task:
    """The three splits of a data set, its number of classes, and the layer that makes its elements vectors."""

    train: Examples
    dev: Examples
    test: Examples
    classes: int
    embedding: nn.Module
    vocabulary: list[str]


def load_digit_rows(args: argparse.Namespace) -> Task:
    """Handwritten digits, each a sequence of 8 rows of 8 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    rows = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 8, 8)
    parts = sentence_data.fold_indices(labels, 10, args.fold)
    train, dev, test = (Examples(list(rows[part]), torch.tensor(labels[part])) for part in parts)
    return Task(train.first(args.limit), dev, test, 10, nn.Linear(8, args.embed), vocabulary=[])


def load_sentences(args: argparse.Namespace) -> Task:
    corpus = sentence_data.CORPORA[args.dataset]
    if args.fold and not corpus.cross_validated:
        raise InputError(f"{args.dataset} has a test split of its own: leave --fold out")
    splits = sentence_data.load(args.dataset, args.data_dir, args.fold)
    vocabulary = sentence_data.build_vocabulary(splits[0].sentences[: args.limit])
    embedding = nn.Embedding(len(vocabulary), args.embed, padding_idx=sentence_data.PADDING)
    nn.init.normal_(embedding.weight, std=0.1).data[sentence_data.PADDING] = 0.0

    def numbers(split: sentence_data.Split) -> Examples:
        encoded = [torch.tensor(sentence_data.encode(sentence, vocabulary)) for sentence in split.sentences]
        return Examples(encoded, torch.tensor(split.labels))

    train, dev, test = map(numbers, splits)
    return Task(train.first(args.limit), dev, test, corpus.classes, embedding, list(vocabulary))


class Recurrent(nn.Module):
    """SRU, LSTM or GRU behind the interface of all encoders: x `(L, B, in)`, lengths `(B,)` to `(L, B, out)`."""

    def __init__(self, kind: str, input_size: int, hidden_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.output_size = hidden_size
        # Dropout acts between layers; torch warns about it where there is only one.
        between = dropout if layers > 1 else 0.0
        self.rnn = recurrent_class(kind)(input_size, hidden_size, num_layers=layers, dropout=between)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if self.kind == "sru":
            return self.rnn(x, lengths=lengths)[0]
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0])[0]


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


def build_model(task: Task, args: argparse.Namespace) -> Classifier:
    encoder: Recurrent | Convolution
    if args.encoder == "cnn":
        encoder = Convolution(args.embed, args.hidden)
    else:
        encoder = Recurrent(args.encoder, args.embed, args.hidden, args.layers, args.dropout)
    return Classifier(task.embedding, encoder, task.classes, args.dropout)


class Run:
    """One training run: the model, its numbers so far, and the files in `--out`."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.device = choose_device(args.device)
        self.model = build_model(task, args).to(self.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        # fused: one pass over the parameters, several times faster where most of them are a large embedding.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, fused=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.out = Path(args.out or f"runs/{args.dataset}-{args.encoder}")
        self.weights = self.out / "weights.safetensors"
        self.best_epoch, self.best_dev_accuracy = 0, -1.0
        self.test_accuracy: float | None = None
        self.epochs: list[dict[str, Any]] = []

    def train(self) -> None:
        """Train until the last epoch, or until the development accuracy has stopped rising; save the best weights."""
        self.out.mkdir(parents=True, exist_ok=True)
        write(self.out / "vocabulary.json", json.dumps(self.task.vocabulary))
        self.save(0, self.accuracy(self.task.dev))
        for epoch in range(1, self.args.epochs + 1):
            started = time.perf_counter()
            loss, accuracy = self.train_epoch(epoch)
            dev = self.accuracy(self.task.dev)
            seconds = round(time.perf_counter() - started, 3)
            names = ("epoch", "train_loss", "train_accuracy", "dev_accuracy", "seconds")
            self.epochs.append(dict(zip(names, (epoch, loss, accuracy, dev, seconds), strict=True)))
            self.save(epoch, dev)
            line = f"epoch {epoch:2}: loss {loss:.4f}, accuracy {accuracy:.4f}, dev accuracy {dev:.4f}, {seconds:.1f} s"
            print(line, flush=True)
            if epoch - self.best_epoch >= self.args.patience:
                break

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss and accuracy over the training examples, each measured just before the model learns from it."""
        self.model.train()
        total, correct, seen = 0.0, 0, 0
        batches = self.task.train.batches(self.args.batch_size, self.generator)
        # disable=None: no bar where nobody watches, so that log files stay readable.
        with tqdm(batches, f"epoch {epoch}", leave=False, disable=None, unit="batch") as progress:
            for indices in progress:
                sequences, lengths, labels = self.task.train.batch(indices, self.device)
                scores = self.model(sequences, lengths)
                loss = nn.functional.cross_entropy(scores, labels)
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
                self.optimizer.step()
                total += loss.item() * len(labels)
                correct += int((scores.argmax(1) == labels).sum())
                seen += len(labels)
                progress.set_postfix(loss=f"{total / seen:.4f}", accuracy=f"{correct / seen:.4f}", refresh=False)
        if not math.isfinite(total):
            raise InputError(f"the loss became {total} in epoch {epoch}: try a smaller --lr")
        return total / seen, correct / seen

    @torch.no_grad()
    def accuracy(self, examples: Examples) -> float:
        self.model.eval()
        batches = (examples.batch(indices, self.device) for indices in examples.batches(256))
        correct = sum(int((self.model(*inputs).argmax(1) == labels).sum()) for *inputs, labels in batches)
        return correct / len(examples.labels)

    def finish(self) -> float:
        """Accuracy of the best weights on the test split."""
        self.model.load_state_dict(safetensors.load(self.weights.read_bytes()))
        self.test_accuracy = self.accuracy(self.task.test)
        self.save_metrics()
        self.draw()
        return self.test_accuracy

    def save(self, epoch: int, dev_accuracy: float) -> None:
        """Save the numbers so far and, if none were better, the weights."""
        if dev_accuracy > self.best_dev_accuracy:
            write(self.weights, safetensors.save(self.model.state_dict()))
            self.best_epoch, self.best_dev_accuracy = epoch, dev_accuracy
        self.save_metrics()

    def save_metrics(self) -> None:
        names = ("device", "parameters", "best_epoch", "best_dev_accuracy", "test_accuracy", "epochs")
        metrics = {"arguments": vars(self.args), "versions": versions()} | {name: getattr(self, name) for name in names}
        # default=str: paths and the device.
        write(self.out / "metrics.json", json.dumps(metrics, indent=2, default=str))

    def draw(self) -> None:
        """Save the learning curves as a picture with two panels."""
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, name in ((left, "train_loss"), (right, "train_accuracy"), (right, "dev_accuracy")):
            values = [record[name] for record in self.epochs]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name.replace("_", " "))
        for axes, quantity in ((left, "loss"), (right, "accuracy")):
            axes.set(xlabel="epoch", ylabel=quantity)
            axes.legend()
        # A figure made without pyplot is drawn by Agg, which needs no display.
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write(self.out / "curves.png", picture.getvalue())


def write(path: Path, data: str | bytes) -> None:
    """Write another file, then rename it to `path`, so that there is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    used = [sys.modules[name] for name in ("numpy", "sklearn", "torch", "numba", "numsru") if name in sys.modules]
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in used}}


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} does not work ({str(error).splitlines()[0]}): try --device cpu") from None
    return device


def within(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """An argument type: numbers from `low` to `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return value

    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = within(int, 1, 10**9)
    add = parser.add_argument_group("data").add_argument
    sets = ["digits", *sentence_data.CORPORA]
    add("--dataset", choices=sets, default="digits", metavar="NAME", help=f"one of {', '.join(sets)} [%(default)s]")
    text = "folder with MR/rt-polarity.all and so on [environment variable NUMSRU_DATA; without it: Hugging Face hub]"
    add("--data-dir", default=os.environ.get("NUMSRU_DATA"), type=Path, metavar="DIR", help=text)
    text = "which tenth of a data set without a test split to test on, 0 to 9 [%(default)s]"
    add("--fold", type=int, choices=range(sentence_data.FOLDS), default=0, metavar="N", help=text)
    add("--limit", type=positive, metavar="N", help="train on N examples only, for a quick look [all]")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=["sru", "lstm", "gru", "cnn"], default="sru", help="what reads the vectors [%(default)s]")
    add("--layers", type=positive, default=2, metavar="N", help="layers of sru, lstm or gru [%(default)s]")
    text = "size of the encoder's state; in the cnn, maps of each of the widths 3, 4 and 5 [%(default)s]"
    add("--hidden", type=positive, default=128, metavar="N", help=text)
    add("--embed", type=positive, default=300, metavar="N", help="size of the embedding [%(default)s]")
    text = "dropout probability after the embedding, between layers and before the classifier [0.5; digits: 0.3]"
    add("--dropout", type=within(float, 0, 0.99), metavar="P", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=50, metavar="N", help="largest number of epochs [%(default)s]")
    text = "stop after N epochs without a better accuracy on the development split [%(default)s]"
    add("--patience", type=positive, default=20, metavar="N", help=text)
    add("--batch-size", type=positive, default=32, metavar="N", help="sequences per step [%(default)s]")
    add("--lr", type=within(float, 0, math.inf), default=1e-3, help="learning rate of Adam [%(default)s]")
    add("--clip", type=within(float, 0, math.inf), default=5.0, help="largest norm of the gradient [%(default)s]")
    add("--seed", type=within(int, 0, 2**63 - 1), default=0, help="same seed, same result [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda if there is one, otherwise cpu]")
    text = "folder for weights.safetensors, vocabulary.json, metrics.json and curves.png [runs/DATASET-ENCODER]"
    add("--out", type=Path, metavar="DIR", help=text)
    args = parser.parse_args(argv)
    if args.dropout is None:
        args.dropout = 0.3 if args.dataset == "digits" else 0.5
    return args


def train(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    task = load_digit_rows(args) if args.dataset == "digits" else load_sentences(args)
    run = Run(task, args)
    sizes = [len(part.labels) for part in (task.train, task.dev, task.test)]
    print(f"{args.dataset}: {sizes[0]} train, {sizes[1]} dev and {sizes[2]} test examples of {task.classes} classes")
    print(f"{args.encoder}: {run.parameters:,} parameters on {run.device}")
    try:
        run.train()
        test_accuracy = run.finish()
    except KeyboardInterrupt:
        if not run.epochs:
            raise
        run.draw()
        print(f"interrupted: the best weights, of epoch {run.best_epoch}, are in {run.weights}")
        return 130
    print(f"best: epoch {run.best_epoch}, dev accuracy {run.best_dev_accuracy:.4f}; written to {run.out}")
    print(f"test accuracy: {test_accuracy:.4f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return train(args)
    except (InputError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "pip install" not in str(error):
            raise  # not the missing CUDA compiler, of which numsru tells what to install
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the end of the first epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
