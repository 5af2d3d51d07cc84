"""Train a language model: which word, or character, comes next in a text.

Without arguments it learns the help texts that come with Python, character by character, in a minute or two, and then
writes some of its own. Stopped at any moment, the same command goes on where it was.

  python examples/train_lm.py
  python examples/train_lm.py --generate 500 --prompt "The statement"
  python examples/train_lm.py --text FILE --level word
  python examples/train_lm.py --dataset ptb --data-dir DATA --encoder sru --layers 6 --parameters 2660000
  torchrun --nproc-per-node 2 examples/train_lm.py

The last line printed tells how well the model predicts the test text: the perplexity per word, or bits per character.
"""

import argparse
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Threads that wait for others spin by default; where another program wants the cores, that makes training ten times
# slower and more. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import processes
    import text_data
    import torch
    from common import InputError, positive, versions, within, write
    from language_model import (
        LanguageModel,
        Shape,
        State,
        count_parameters,
        cross_entropy,
        hidden_within,
        mean_loss,
        sample,
    )
    from matplotlib.figure import Figure
    from processes import Processes
    from safetensors import torch as safetensors
    from text_data import Corpus
    from torch import nn
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    print(
        f"error: no module {missing.name}: run `pip install -e '.[examples]'` in the folder above examples",
        file=sys.stderr,
    )
    sys.exit(2)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Arguments that may change when a run goes on: they do not change what is learned.
FREE = {"text", "data_dir", "device", "out", "restart", "checkpoint_every", "tensorboard"}
FREE |= {"generate", "prompt", "temperature"}


def build_model(symbols: int, args: argparse.Namespace) -> LanguageModel:
    """The model of the arguments; sets `args.hidden` where `--parameters` decides it."""
    names = ("encoder", "hidden", "layers", "dropout", "rnn_dropout", "sru_version", "highway_bias")
    shape = {name: getattr(args, name) for name in names}
    if args.parameters is not None:

        def build(hidden: int) -> LanguageModel:
            return LanguageModel(symbols, Shape(**shape | {"hidden": hidden}))

        args.hidden = shape["hidden"] = hidden_within(args.parameters, build)
    return LanguageModel(symbols, Shape(**shape))


def figure_of(loss: float, level: str) -> float:
    """What is reported of a mean loss in nats: perplexity per word, or bits per character."""
    if level == "char":
        return loss / math.log(2)
    return math.exp(loss) if loss < 700 else math.inf


def name_of_figure(level: str) -> str:
    return {"char": "bits per character", "word": "perplexity"}[level]


class Run:
    """One training run: the model, how far it is in the text, its numbers so far, and the files in `--out`."""

    def __init__(self, corpus: Corpus, args: argparse.Namespace, all_processes: Processes) -> None:
        self.corpus, self.args, self.processes = corpus, args, all_processes
        device = self.processes.device
        if args.batch_size % self.processes.count:
            raise InputError(f"--batch-size {args.batch_size} is not a multiple of {self.processes.count} processes")
        self.model = build_model(len(corpus.vocabulary), args).to(device)
        self.module = self.processes.wrap(self.model)
        kinds = {"adam": partial(torch.optim.AdamW, weight_decay=args.weight_decay),
                 "sgd": partial(torch.optim.SGD, weight_decay=args.weight_decay)}  # fmt: skip
        # fused: one pass over the parameters, several times faster where most of them are a large embedding.
        self.optimizer = kinds[args.optimizer](self.model.parameters(), lr=args.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        dtype = PRECISIONS[args.precision]
        self.autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

        all_streams = text_data.streams(corpus.train, args.batch_size)
        self.inputs, self.targets = (self.processes.columns(stream).to(device) for stream in all_streams)
        self.valid = corpus.valid.to(device)
        self.steps_per_epoch = math.ceil(len(self.inputs) / args.bptt)

        self.step = 0
        self.state: State = None
        # Of the epoch and of the stretch between two points of the curve: sum of losses, steps of time they are of.
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("epoch", "stretch")}
        self.lengths = {"epoch": 0, "stretch": 0}
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.best_epoch, self.best_valid_loss = 0, math.inf
        self.epochs: list[dict[str, Any]] = []
        self.curve: list[tuple[int, float]] = []
        self.test_loss: float | None = None

        self.out: Path = args.out
        self.weights, self.checkpoint = self.out / "weights.safetensors", self.out / "checkpoint.pt"
        self.writer = open_tensorboard(args, self.processes)

    @property
    def configuration(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        chosen = {name: value for name, value in vars(self.args).items() if name not in FREE}
        return chosen | {"checksum": self.corpus.checksum}

    def resume(self) -> None:
        """Go on from the checkpoint in `--out`, if there is one."""
        data = None if self.args.restart else self.processes.read(self.checkpoint)
        if data is None:
            return
        try:
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            before = saved["configuration"]
        except Exception as error:  # zip, pickle and key errors: there is no common class
            reason = f"{self.checkpoint} is not a checkpoint of this program ({type(error).__name__})"
            raise InputError(f"{reason}: choose another --out, or begin anew with --restart") from None
        now = self.configuration
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            name = changed[0]
            what = f"--{name.replace('_', '-')} {before.get(name)}, not {now[name]}"
            reason = f"{self.out} holds a run of {'another text' if name == 'checksum' else what}"
            raise InputError(f"{reason}: choose another --out, or begin anew with --restart")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if saved["state"] is not None:
            self.state = tuple(self.processes.columns(part.to(self.processes.device)) for part in saved["state"])
        for name, total in saved["sums"].items():
            self.sums[name].fill_(total)
        for name in ("step", "lengths", "seconds", "cpu_seconds", "best_epoch", "best_valid_loss", "epochs", "curve"):
            setattr(self, name, saved[name])

    def train(self) -> None:
        """Train from where the run is to its last step."""
        if self.processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write(self.out / "vocabulary.json", json.dumps(self.corpus.vocabulary))
            self.save_metrics()
        while self.step < self.args.epochs * self.steps_per_epoch:
            self.train_epoch()

    def train_epoch(self) -> None:
        """Train to the end of the epoch, with checkpoints on the way."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.model.train()
        # disable=None: no bar where nobody watches, so that log files stay readable.
        hidden = None if self.processes.first else True
        bar = tqdm(total=self.steps_per_epoch, desc=f"epoch {epoch + 1}", leave=False, disable=hidden, initial=start)
        began, cpu_began = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = self.seconds, self.cpu_seconds
        with bar:
            for i in range(start, self.steps_per_epoch):
                self.train_step(slice(i * self.args.bptt, (i + 1) * self.args.bptt))
                bar.update()
                self.seconds = seconds + time.perf_counter() - began
                self.cpu_seconds = cpu_seconds + time.process_time() - cpu_began
                if self.step % self.args.log_every == 0:
                    loss = self.mean_of("stretch")
                    self.curve.append((self.step, loss))
                    self.start_again("stretch")
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    self.log(train_loss=loss, learning_rate=self.learning_rate())
                if self.step % self.args.checkpoint_every == 0 and i + 1 < self.steps_per_epoch:
                    self.save_checkpoint()
        self.end_epoch()

    def train_step(self, steps: slice) -> None:
        """Learn from these steps of the streams, starting with the state after those before."""
        # The masks of a step depend on nothing but the seed, the step and the process, so no random state is kept.
        torch.manual_seed(random.Random(f"{self.args.seed} {self.step} {self.processes.rank}").getrandbits(63))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        inputs, targets = self.inputs[steps], self.targets[steps]
        with self.autocast():
            scores, state = self.module(inputs, self.state)
        loss = cross_entropy(scores, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state = tuple(part.detach() for part in state)
        for name in self.sums:
            self.sums[name] += loss.detach().double() * len(inputs)
            self.lengths[name] += len(inputs)
        self.step += 1

    def learning_rate(self) -> float:
        """Of the step to come: rises over `--warmup` steps; with the cosine schedule falls to 0 at the last step."""
        rate = self.args.lr * min(1.0, (self.step + 1) / max(1, self.args.warmup))
        if self.args.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * self.step / (self.args.epochs * self.steps_per_epoch))) / 2
        return rate

    def mean_of(self, name: str) -> float:
        """Mean loss of the epoch so far or of the stretch, over all processes."""
        return self.finite(self.processes.mean(self.sums[name]) / max(1, self.lengths[name]))

    def finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} before step {self.step}: try a smaller --lr")
        return loss

    def start_again(self, name: str) -> None:
        self.sums[name].zero_()
        self.lengths[name] = 0

    def end_epoch(self) -> None:
        """Measure, keep the weights if none were better, write the checkpoint, and print the epoch's line."""
        train_loss = self.mean_of("epoch")
        # Every process measures the whole text: that takes no longer than waiting for one, and nothing is sent.
        valid_loss = self.finite(mean_loss(self.model, self.valid, self.autocast))
        record = {"epoch": len(self.epochs) + 1, "train_loss": train_loss, "valid_loss": valid_loss,
                  "seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3)}  # fmt: skip
        self.epochs.append(record)
        if valid_loss < self.best_valid_loss:
            self.best_epoch, self.best_valid_loss = record["epoch"], valid_loss
            if self.processes.first:
                write(self.weights, safetensors.save(self.model.state_dict()))
        self.state, self.seconds, self.cpu_seconds = None, 0.0, 0.0
        self.start_again("epoch")
        self.save_checkpoint()
        self.log(valid_loss=valid_loss)
        if self.processes.first:
            self.save_metrics()
            level = self.corpus.level
            figures = ", ".join(
                f"{name} {figure_of(loss, level):.3f}" for name, loss in (("train", train_loss), ("valid", valid_loss))
            )
            line = f"epoch {record['epoch']:2}: {name_of_figure(level)}: {figures}; {record['seconds']:.1f} s"
            print(line, flush=True)

    def save_checkpoint(self) -> None:
        """Write all that the run needs to go on from this step."""
        self.mean_of("stretch")
        sums = {name: self.processes.mean(total) for name, total in self.sums.items()}
        state = None if self.state is None else tuple(self.processes.all_columns(part) for part in self.state)
        if not self.processes.first:
            return
        names = ("configuration", "step", "lengths", "seconds", "cpu_seconds", "best_epoch", "best_valid_loss")
        saved = {name: getattr(self, name) for name in (*names, "epochs", "curve")}
        saved |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        saved |= {"scaler": self.scaler.state_dict(), "state": state, "sums": sums}
        data = io.BytesIO()
        torch.save(saved, data)
        write(self.checkpoint, data.getvalue())

    def finish(self) -> float:
        """Mean loss of the best weights on the test text."""
        self.model.load_state_dict(safetensors.load(self.weights.read_bytes()))
        self.test_loss = mean_loss(self.model, self.corpus.test.to(self.processes.device), self.autocast)
        self.log(test_loss=self.test_loss)
        self.save_metrics()
        self.draw()
        return self.test_loss

    def save_metrics(self) -> None:
        """Write what is known of the run for people and other programs."""
        metrics = {
            "arguments": vars(self.args),
            "versions": versions(),
            "device": self.processes.device,
            "processes": self.processes.count,
            "level": self.corpus.level,
            "symbols": len(self.corpus.vocabulary),
            "parameters": count_parameters(self.model),
            "steps_per_epoch": self.steps_per_epoch,
        }
        names = ("step", "best_epoch", "best_valid_loss", "test_loss", "epochs", "curve")
        metrics |= {name: getattr(self, name) for name in names}
        # JSON has no infinity; default=str: paths and the device.
        metrics["best_valid_loss"] = self.best_valid_loss if self.epochs else None
        write(self.out / "metrics.json", json.dumps(metrics, indent=2, default=str))

    def log(self, **values: float) -> None:
        """Show numbers of this step in TensorBoard, if it is wanted."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.flush()

    def draw(self) -> None:
        """Save the loss over the steps and the epochs' figures as a picture with two panels."""
        level = self.corpus.level
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        if self.curve:
            left.plot(*zip(*self.curve, strict=True))
        left.set(xlabel="step", ylabel="training loss (nats)")
        for name in ("train_loss", "valid_loss"):
            values = [figure_of(record[name], level) for record in self.epochs]
            right.plot(range(1, len(values) + 1), values, marker=".", label=name.removesuffix("_loss"))
        right.set(xlabel="epoch", ylabel=name_of_figure(level))
        right.legend()
        # A figure made without pyplot is drawn by Agg, which needs no display.
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write(self.out / "curves.png", picture.getvalue())


def open_tensorboard(args: argparse.Namespace, all_processes: Processes) -> Any:
    """A writer of TensorBoard's files, or None where none is wanted."""
    if not (args.tensorboard and all_processes.first):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise InputError("--tensorboard needs a package: run `pip install tensorboard`") from None
    return SummaryWriter(args.out / "tensorboard")


def load_text(args: argparse.Namespace) -> Corpus:
    if args.text is not None:
        texts = text_data.split(text_data.read(args.text))
    elif args.dataset == "ptb":
        texts = text_data.read_ptb(args.data_dir)
    else:
        texts = text_data.read_python_help()
    return text_data.encode(texts, args.level, args.limit)


def write_text(model: LanguageModel, vocabulary: list[str], args: argparse.Namespace, count: int) -> str:
    """The prompt and `count` symbols that the model puts behind it."""
    numbers = {symbol: number for number, symbol in enumerate(vocabulary)}
    unknown = numbers[text_data.UNKNOWN]
    given = list(args.prompt) if args.level == "char" else args.prompt.split()
    prompt = [numbers.get(symbol, unknown) for symbol in given]
    # Without a prompt the text begins as a line does.
    line_end = numbers.get("\n" if args.level == "char" else text_data.END_OF_LINE, unknown)
    drawn = sample(model, prompt or [line_end], count, args.temperature, unknown, args.seed)
    return text_data.join([*given, *(vocabulary[number] for number in drawn)], args.level)


def generate(args: argparse.Namespace) -> int:
    """Print text from the trained model in `--out`."""
    files = [args.out / name for name in ("metrics.json", "vocabulary.json", "weights.safetensors")]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"there is no file {missing[0]}: train first, with the same --out and without --generate")
    trained = json.loads(files[0].read_text(encoding="utf-8"))["arguments"]
    vocabulary = json.loads(files[1].read_text(encoding="utf-8"))
    free = {name: getattr(args, name) for name in FREE | {"seed"}}
    args = argparse.Namespace(**trained | free)
    with processes.join(args.device) as all_processes:
        model = build_model(len(vocabulary), args).to(all_processes.device)
        model.load_state_dict(safetensors.load(files[2].read_bytes()))
        if all_processes.first:
            print(write_text(model, vocabulary, args, args.generate))
    return 0


def train(args: argparse.Namespace) -> int:
    torch.backends.cudnn.deterministic = True
    corpus = load_text(args)
    with processes.join(args.device) as all_processes:
        torch.manual_seed(args.seed)
        run = Run(corpus, args, all_processes)
        run.resume()
        if all_processes.first:
            describe(run)
        try:
            run.train()
            if all_processes.first:
                report(run)
        except KeyboardInterrupt:
            if all_processes.first:
                tell_what_is_kept(run)
            return 130
    return 0


def describe(run: Run) -> None:
    corpus, args = run.corpus, run.args
    unit = {"char": "characters", "word": "words"}[args.level]
    sizes = f"{len(corpus.train):,} train, {len(corpus.valid):,} valid and {len(corpus.test):,} test {unit}"
    print(f"{args.text or args.dataset}: {sizes}, {len(corpus.vocabulary):,} of them different")
    on = f"{run.processes.device}" + (f" in {run.processes.count} processes" if run.processes.count > 1 else "")
    print(f"{args.encoder}: {count_parameters(run.model):,} parameters, {args.hidden} units a layer, on {on}")
    if run.step:
        print(f"goes on after step {run.step} of {args.epochs * run.steps_per_epoch}; --restart would begin anew")
    sys.stdout.flush()


def report(run: Run) -> None:
    level = run.corpus.level
    test_loss = run.finish()
    text = write_text(run.model, run.corpus.vocabulary, run.args, 400 if level == "char" else 60)
    print(f"\nThe model writes:\n\n{text.strip()}\n")
    best = f"epoch {run.best_epoch}, valid {name_of_figure(level)} {figure_of(run.best_valid_loss, level):.3f}"
    print(f"best: {best}; written to {run.out}")
    print(f"test {name_of_figure(level)}: {figure_of(test_loss, level):.3f}")


def tell_what_is_kept(run: Run) -> None:
    kept = []
    if run.epochs:
        run.draw()
        kept.append(f"the best weights, of epoch {run.best_epoch}, are in {run.weights}")
    if run.checkpoint.exists():
        kept.append("the same command goes on from the last checkpoint")
    print(f"interrupted: {'; '.join(kept) or 'nothing is kept yet'}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    probability, number = within(float, 0, 0.99), within(float, 0, math.inf)
    add = parser.add_argument_group("data").add_argument
    text = "python: help texts that come with Python; ptb: the Penn Treebank [%(default)s]"
    add("--dataset", choices=["python", "ptb"], default="python", help=text)
    add("--text", type=Path, metavar="FILE", help="any text in UTF-8; its last tenth is for validation and test")
    text = "folder with PTB/ptb.train.txt and so on [environment variable NUMSRU_DATA]"
    add("--data-dir", default=os.environ.get("NUMSRU_DATA"), type=Path, metavar="DIR", help=text)
    add("--level", choices=["word", "char"], help="what is predicted, words or characters [ptb: word; others: char]")
    add("--limit", type=positive, metavar="N", help="use the first N symbols of each text only, for a quick look [all]")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=["sru", "lstm", "gru"], default="sru", help="what reads the text [%(default)s]")
    add("--layers", type=positive, default=3, metavar="N", help="layers of the encoder [%(default)s]")
    add("--hidden", type=positive, default=192, metavar="N", help="units of a layer and of the embedding [%(default)s]")
    text = "choose --hidden for this size of the model: the largest multiple of 4 with at most N parameters. The same "
    add("--parameters", type=positive, metavar="N", help=f"{text}N for two encoders makes them comparable")
    text = "dropout probability after the embedding, between layers and before the output [%(default)s]"
    add("--dropout", type=probability, default=0.1, metavar="P", help=text)
    text = "dropout probability of the input of each layer's matrix products [%(default)s]"
    add("--rnn-dropout", type=probability, default=0.0, metavar="P", help=text)
    add("--sru-version", type=int, choices=[1, 2], default=2, help="2: the SRU's gates see its state [%(default)s]")
    text = "first bias of the SRU's reset gate: the lower, the more passes a layer unchanged [%(default)s]"
    add("--highway-bias", type=float, default=-3.0, metavar="X", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=8, metavar="N", help="passes over the text [%(default)s]")
    text = "streams of text that are read side by side, divided among the processes [%(default)s]"
    add("--batch-size", type=positive, default=32, metavar="N", help=text)
    text = "symbols of each stream per step, as far as gradients reach back [%(default)s]"
    add("--bptt", type=positive, default=64, metavar="N", help=text)
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="adam decouples weight decay [%(default)s]")
    add("--lr", type=number, default=8e-3, help="largest learning rate [%(default)s]")
    text = "cosine: the learning rate falls to 0 at the end; constant: it stays [%(default)s]"
    add("--schedule", choices=["cosine", "constant"], default="cosine", help=text)
    add("--warmup", type=within(int, 0, 10**9), default=100, metavar="N", help="steps to reach --lr in [%(default)s]")
    add("--weight-decay", type=number, default=0.0, metavar="X", help="[%(default)s]")
    add("--clip", type=number, default=1.0, help="largest norm of the gradient [%(default)s]")
    text = "fp32, or matrix products in bf16 or fp16 (with scaled gradients) [%(default)s]"
    add("--precision", choices=list(PRECISIONS), default="fp32", help=text)
    add("--seed", type=within(int, 0, 2**63 - 1), default=0, help="same seed, same result [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... [cuda if there is one, otherwise cpu]")

    add = parser.add_argument_group("files").add_argument
    text = "folder for what is kept of the run; if it holds one, that goes on [runs/DATASET-ENCODER]"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--restart", action="store_true", help="begin anew even if --out holds a run")
    text = "steps between checkpoints; there is one at the end of each epoch, too [%(default)s]"
    add("--checkpoint-every", type=positive, default=200, metavar="N", help=text)
    add("--log-every", type=positive, default=20, metavar="N", help="steps between points of the curve [%(default)s]")
    add("--tensorboard", action="store_true", help="also write numbers for TensorBoard, to tensorboard in --out")

    add = parser.add_argument_group("writing text").add_argument
    add("--generate", type=positive, metavar="N", help="train nothing; let the model in --out write N symbols")
    add("--prompt", default="", metavar="TEXT", help="what the written text begins with [the start of a line]")
    text = "below 1: likelier and more alike; above 1: wilder [%(default)s]"
    add("--temperature", type=number, default=0.7, metavar="X", help=text)
    args = parser.parse_args(argv)
    if args.level is None:
        args.level = "word" if args.dataset == "ptb" and args.text is None else "char"
    if args.out is None:
        args.out = Path(f"runs/{args.text.stem if args.text else args.dataset}-{args.encoder}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return train(args) if args.generate is None else generate(args)
    except (InputError, OSError, RuntimeError) as error:
        # torch cannot do everything in 16 bits on every CPU, and says so when it is asked to.
        if "could not create a primitive" in str(error):
            error = InputError(f"this machine cannot compute {args.encoder} in {args.precision}: try --precision fp32")
        if isinstance(error, RuntimeError) and "pip install" not in str(error):
            raise  # not the missing CUDA compiler, of which numsru tells what to install
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
