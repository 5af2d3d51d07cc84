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
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait for others spin by default; where another program wants the cores, that makes training ten times
# slower and more. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import sentence_data
    import torch
    import word_vectors
    from classifier_model import Classifier, Convolution, Recurrent
    from common import (
        InputError,
        above_zero,
        choose_device,
        fill_in,
        load_checkpoint,
        open_tensorboard,
        positive,
        tells_what_to_do,
        versions,
        within,
        write,
    )
    from run_files import configuration, difference_of, draw_curves, is_finished, recorded
    from safetensors import torch as safetensors
    from sentence_data import Examples
    from sklearn.datasets import load_digits
    from torch import nn
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    print(
        f"error: no module {missing.name}: run `pip install -e '.[examples]'` in the folder above examples",
        file=sys.stderr,
    )
    sys.exit(2)


@dataclass
class Task:
    """The three splits of a data set, its number of classes, and the layer that makes its elements vectors.

    Args:
        embed: Size of those vectors.
        vocabulary: The words, in the order of the embedding's rows.
    """

    train: Examples
    dev: Examples
    test: Examples
    classes: int
    embedding: nn.Module
    embed: int
    vocabulary: list[str]

    def digest(self) -> int:
        """A checksum of the vocabulary and of all examples."""
        crc = zlib.crc32("\0".join(self.vocabulary).encode())
        for examples in (self.train, self.dev, self.test):
            for values in (*examples.sequences, examples.labels):
                crc = zlib.crc32(values.numpy(), crc)
        return crc


def load_digit_rows(args: argparse.Namespace) -> Task:
    """Handwritten digits, each a sequence of 8 rows of 8 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    rows = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 8, 8)
    parts = sentence_data.fold_indices(labels, 10, args.fold)
    train, dev, test = (Examples(list(rows[part]), torch.tensor(labels[part])) for part in parts)
    return Task(train.first(args.limit), dev, test, 10, nn.Linear(8, args.embed), args.embed, vocabulary=[])


def load_sentences(args: argparse.Namespace) -> Task:
    corpus = sentence_data.CORPORA[args.dataset]
    if args.fold and not corpus.cross_validated:
        raise InputError(f"{args.dataset} has a test split of its own: leave --fold out")
    splits = sentence_data.load(args.dataset, args.data_dir, args.fold)
    vocabulary = sentence_data.build_vocabulary(splits[0].sentences[: args.limit])
    embedding = build_embedding(vocabulary, args)

    def numbers(split: sentence_data.Split) -> Examples:
        encoded = [torch.tensor(sentence_data.encode(sentence, vocabulary)) for sentence in split.sentences]
        return Examples(encoded, torch.tensor(split.labels))

    train, dev, test = map(numbers, splits)
    return Task(
        train.first(args.limit), dev, test, corpus.classes, embedding, embedding.embedding_dim, list(vocabulary)
    )


def build_embedding(vocabulary: dict[str, int], args: argparse.Namespace) -> nn.Embedding:
    """Random vectors, and in place of them those of the words that `--vectors` has."""
    size = args.embed
    if args.vectors:
        rows, vectors = word_vectors.load(args.vectors, args.vectors_name)
        size = vectors.shape[1]
        if args.embed not in (None, size):
            raise InputError(f"{args.vectors} has vectors of size {size}: leave --embed {args.embed} out")
    embedding = nn.Embedding(len(vocabulary), size, padding_idx=sentence_data.PADDING, sparse=args.sparse)
    nn.init.normal_(embedding.weight, std=0.1).data[sentence_data.PADDING] = 0.0
    if args.vectors:
        found = {row: rows[word] for word, row in vocabulary.items() if word in rows}
        chosen = torch.from_numpy(vectors[list(found.values())])
        embedding.weight.data[list(found)] = chosen
        print(f"{args.vectors}: vectors of size {size} for {len(found):,} of {len(vocabulary):,} words")
    embedding.weight.requires_grad_(not args.freeze)
    return embedding


def load_task(args: argparse.Namespace) -> Task:
    return load_digit_rows(args) if args.dataset == "digits" else load_sentences(args)


def build_model(task: Task, args: argparse.Namespace) -> Classifier:
    encoder: Recurrent | Convolution
    if args.encoder == "cnn":
        encoder = Convolution(task.embed, args.hidden)
    else:
        encoder = Recurrent(args.encoder, task.embed, args.hidden, args.layers, args.dropout, args.sru_version)
    return Classifier(task.embedding, encoder, task.classes, args.dropout)


class Run:
    """One training run: the model, its numbers so far, and the files in `--out`.

    The checkpoint is written first at the end of an epoch and holds everything: the other files follow from it. So a
    process may be killed at any moment; the epoch that it was in is trained again from the same random states.
    """

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.device = choose_device(args.device)
        self.model = build_model(task, args).to(self.device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizers = build_optimizers(self.model, args)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.out = Path(args.out or f"runs/{args.dataset}-{args.encoder}")
        self.weights = self.out / "weights.safetensors"
        self.checkpoint = self.out / "checkpoint.pt"
        self.configuration = configuration(args) | {"device": str(self.device), "data": task.digest()}
        self.best_epoch, self.best_dev_accuracy = 0, -1.0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.test_accuracy: float | None = None
        self.epochs: list[dict[str, Any]] = []

    def train(self) -> None:
        """Train until the last epoch, or until the development accuracy has stopped rising; save the best weights."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.args.resume and self.checkpoint.exists():
            self.restore()
        else:
            self.refuse_to_overwrite()
            self.keep_if_best(0, self.accuracy(self.task.dev))
        write(self.out / "vocabulary.json", json.dumps(self.task.vocabulary))
        self.save_outputs()
        board = open_tensorboard(self.out, len(self.epochs) + 1) if self.args.tensorboard else None
        while len(self.epochs) < self.args.epochs and len(self.epochs) - self.best_epoch < self.args.patience:
            epoch = len(self.epochs) + 1
            started, cpu_started = time.perf_counter(), time.process_time()
            loss, accuracy = self.train_epoch(epoch)
            train_seconds = time.process_time() - cpu_started
            dev = self.accuracy(self.task.dev)
            seconds = round(time.perf_counter() - started, 3)
            names = ("epoch", "train_loss", "train_accuracy", "dev_accuracy", "seconds", "train_cpu_seconds")
            values = (epoch, loss, accuracy, dev, seconds, round(train_seconds, 3))
            self.epochs.append(dict(zip(names, values, strict=True)))
            self.keep_if_best(epoch, dev)
            if board:
                for name in names[1:]:
                    board.add_scalar(name, self.epochs[-1][name], epoch)
                board.flush()
            self.save()
            line = f"epoch {epoch:2}: loss {loss:.4f}, accuracy {accuracy:.4f}, dev accuracy {dev:.4f}, {seconds:.1f} s"
            print(line, flush=True)

    def train_epoch(self, epoch: int) -> tuple[float, float]:
        """Mean loss and accuracy over the training examples, each measured just before the model learns from it."""
        self.model.train()
        total, correct, seen = 0.0, 0, 0
        batches = self.task.train.batches(self.args.batch_size, self.generator)
        clipped = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        # disable=None: no bar where nobody watches, so that log files stay readable.
        with tqdm(batches, f"epoch {epoch}", leave=False, disable=None, unit="batch") as progress:
            for indices in progress:
                sequences, lengths, labels = self.task.train.batch(indices, self.device)
                scores = self.model(sequences, lengths)
                loss = nn.functional.cross_entropy(scores, labels)
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(clipped, self.args.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                total += loss.item() * len(labels)
                correct += int((scores.argmax(1) == labels).sum())
                seen += len(labels)
                progress.set_postfix(loss=f"{total / seen:.4f}", accuracy=f"{correct / seen:.4f}", refresh=False)
        if not math.isfinite(total):
            self.checkpoint.unlink(missing_ok=True)  # nothing to go on with
            raise InputError(f"the loss became {total} in epoch {epoch}: try a smaller --lr and another --out")
        return total / seen, correct / seen

    @torch.no_grad()
    def accuracy(self, examples: Examples) -> float:
        self.model.eval()
        batches = (examples.batch(indices, self.device) for indices in examples.batches(256))
        correct = sum(int((self.model(*inputs).argmax(1) == labels).sum()) for *inputs, labels in batches)
        return correct / len(examples.labels)

    def finish(self) -> float:
        """Accuracy of the best weights on the test split."""
        self.model.load_state_dict(self.best_weights)
        self.test_accuracy = self.accuracy(self.task.test)
        self.save_outputs()
        draw_curves(self.out / "curves.png", self.epochs)
        return self.test_accuracy

    def keep_if_best(self, epoch: int, dev_accuracy: float) -> None:
        if dev_accuracy > self.best_dev_accuracy:
            self.best_epoch, self.best_dev_accuracy = epoch, dev_accuracy
            self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def save(self) -> None:
        """Save all that the run needs to go on after this epoch, then the files that are made from it."""
        state = {name: getattr(self, name) for name in ("configuration", *PROGRESS)}
        state["model"] = self.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state["random"] = [torch.get_rng_state(), self.generator.get_state()]
        if self.device.type == "cuda":
            state["random"].append(torch.cuda.get_rng_state(self.device))
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.checkpoint, buffer.getbuffer())
        self.save_outputs()

    def restore(self) -> None:
        """Go on where the checkpoint was written, if the run there has the same configuration."""
        advice = "change --out, or delete the folder"
        state = load_checkpoint(self.checkpoint, self.checkpoint, self.device, "best_weights", advice)
        if difference := difference_of(state["configuration"], self.configuration):
            raise InputError(f"{self.out} holds a run with {difference}: resume with its arguments, or change --out")
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["random"][0].cpu())
        self.generator.set_state(state["random"][1].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][2].cpu(), self.device)
        print(f"resumed after epoch {len(self.epochs)}", flush=True)

    def refuse_to_overwrite(self) -> None:
        """Hours of work may be in a run that was cut off or had other arguments: do not start anew on top of it."""
        if self.checkpoint.exists() and not is_finished(self.out):
            raise InputError(f"{self.out} holds an unfinished run: add --resume, change --out, or delete the folder")
        if before := recorded(self.out):
            lengths = ("epochs", "patience")
            now = self.configuration | {name: getattr(self.args, name) for name in lengths}
            known = before["configuration"] | {name: before["arguments"][name] for name in lengths}
            if difference := difference_of(known, now):
                raise InputError(f"{self.out} holds a run with {difference}: change --out, or delete the folder")
        self.checkpoint.unlink(missing_ok=True)

    def save_outputs(self) -> None:
        write(self.weights, safetensors.save(self.best_weights))
        names = ("configuration", "parameters", *PROGRESS[:2], "test_accuracy", "epochs")
        metrics = {name: getattr(self, name) for name in names}
        metrics |= {"arguments": vars(self.args), "versions": versions(), "device": self.device}
        # default=str: paths and the device.
        write(self.out / "metrics.json", json.dumps(metrics, indent=2, default=str))


# What a run knows of its past, apart from the states of the model, the optimisers and the random generators.
PROGRESS = ("best_epoch", "best_dev_accuracy", "epochs", "best_weights")


def build_optimizers(model: Classifier, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """One optimiser; with `--sparse` a second one, for the embedding."""
    weights = [p for p in model.parameters() if p.requires_grad]
    rest: list[torch.optim.Optimizer] = []
    if args.sparse:
        weights = [p for p in weights if p is not model.embedding.weight]
        rest = [torch.optim.SparseAdam([model.embedding.weight], lr=args.lr)]
    # fused: one pass over the parameters, several times faster where most of them are a large embedding.
    options: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "sgd":
        return [torch.optim.SGD(weights, momentum=args.momentum, **options), *rest]
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return [kind(weights, **options), *rest]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add("--layers", type=positive, metavar="N", help="layers of sru, lstm or gru [2]")
    add("--sru-version", type=int, choices=[1, 2], help="equations of sru, of its first or second paper [1]")
    text = "size of the encoder's state; in the cnn, maps of each of the widths 3, 4 and 5 [%(default)s]"
    add("--hidden", type=positive, default=128, metavar="N", help=text)
    add("--embed", type=positive, metavar="N", help="size of the embedding [that of the vectors; without them: 300]")
    text = "pretrained word vectors: text of GloVe or word2vec, binary of word2vec (.bin, .bin.gz), or .npz [random]"
    add("--vectors", type=Path, metavar="FILE", help=text)
    add("--vectors-name", metavar="NAME", help="which vectors of an .npz file: its arrays words_NAME and vecs_NAME")
    add("--freeze", action="store_true", help="do not train the embedding")
    text = "dropout probability after the embedding, between layers and before the classifier [0.5; digits: 0.3]"
    add("--dropout", type=within(float, 0, 0.99), metavar="P", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=50, metavar="N", help="largest number of epochs [%(default)s]")
    text = "stop after N epochs without a better accuracy on the development split [%(default)s]"
    add("--patience", type=positive, default=20, metavar="N", help=text)
    add("--batch-size", type=positive, default=32, metavar="N", help="sequences per step [%(default)s]")
    add("--optimizer", choices=["adam", "adamw", "sgd"], default="adam", help="[%(default)s]")
    add("--lr", type=within(float, 0, math.inf), default=1e-3, help="learning rate [%(default)s]")
    add("--momentum", type=within(float, 0, 1), metavar="M", help="momentum of sgd [0.9]")
    add("--weight-decay", type=within(float, 0, math.inf), default=0.0, metavar="W", help="[%(default)s]")
    text = "update the vectors of the words in a batch only, by SparseAdam without clipping or weight decay: faster"
    add("--sparse", action="store_true", help=text)
    add("--clip", type=above_zero, default=5.0, help="largest norm of the gradient [%(default)s]")
    add("--tensorboard", action="store_true", help="write the curves for TensorBoard, too, to --out/tensorboard")
    text = "go on with the unfinished run in --out, if there is one, as if it had never been interrupted"
    add("--resume", action="store_true", help=text)
    add("--seed", type=within(int, 0, 2**63 - 1), default=0, help="same seed, same result [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda if there is one, otherwise cpu]")
    text = "folder for weights.safetensors, vocabulary.json, metrics.json and curves.png [runs/DATASET-ENCODER]"
    add("--out", type=Path, metavar="DIR", help=text)
    args = parser.parse_args(argv)
    if args.dropout is None:
        args.dropout = 0.3 if args.dataset == "digits" else 0.5
    if args.dataset == "digits" and (args.sparse or args.vectors or args.freeze):
        parser.error("--vectors, --freeze and --sparse are for words: choose a --dataset of sentences")
    fill_in(parser, args, {
        "layers": (2, args.encoder != "cnn", "--layers is for sru, lstm and gru: leave it out"),
        "sru_version": (1, args.encoder == "sru", "--sru-version is for sru: leave it out"),
        "momentum": (0.9, args.optimizer == "sgd", "--momentum is for sgd: leave it out"),
        "vectors_name": (None, args.vectors is not None, "--vectors-name is for --vectors: leave it out"),
    })  # fmt: skip
    if args.sparse and args.freeze:
        parser.error("--sparse trains the embedding, --freeze does not: leave one of them out")
    if args.embed is None and not args.vectors:
        args.embed = 300
    return args


def train(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    task = load_task(args)
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
        draw_curves(run.out / "curves.png", run.epochs)
        print(f"interrupted (--resume goes on): the best weights, of epoch {run.best_epoch}, are in {run.weights}")
        return 130
    print(f"best: epoch {run.best_epoch}, dev accuracy {run.best_dev_accuracy:.4f}; written to {run.out}")
    print(f"test accuracy: {test_accuracy:.4f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return train(args)
    except (InputError, OSError, RuntimeError) as error:
        if not tells_what_to_do(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the end of the first epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
