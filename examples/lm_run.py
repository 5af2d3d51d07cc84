"""One training run of a language model: steps through the text, checkpoints, measurements, and the files it leaves."""

import argparse
import contextlib
import io
import json
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import text_data
import torch
from common import InputError, load_checkpoint, open_tensorboard, png, versions, write
from language_model import LanguageModel, Shape, State, count_parameters, cross_entropy, hidden_within, mean_loss
from matplotlib.figure import Figure
from processes import Processes
from safetensors import torch as safetensors
from text_data import Corpus
from torch import nn
from tqdm import tqdm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Arguments that may change when a run goes on: they do not change what is learned.
FREE = {"text", "data_dir", "device", "out", "restart", "checkpoint_every", "tensorboard"}
FREE |= {"generate", "prompt", "temperature"}


class DivergedError(InputError):
    """The loss is not finite."""


def difference_of(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first option of which a run had another value than it has now, in words; empty if there is none."""
    for name, value in now.items():
        if value != before.get(name):
            return f"--{name.replace('_', '-')} {before.get(name)}, not {value}"
    return ""


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
        self.writer: Any = None
        self.stop = False  # after the current step

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
        advice = "choose another --out, or begin anew with --restart"
        saved = load_checkpoint(io.BytesIO(data), self.checkpoint, torch.device("cpu"), "sums", advice)
        before, now = saved["configuration"], self.configuration
        another_text = "another text" if now.pop("checksum") != before.get("checksum") else ""
        if what := difference_of(before, now) or another_text:
            raise InputError(f"{self.out} holds a run of {what}: {advice}")
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
            if self.args.restart:
                self.checkpoint.unlink(missing_ok=True)
            if self.args.tensorboard:
                self.writer = open_tensorboard(self.out, self.step + 1)
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
                if i + 1 < self.steps_per_epoch and (self.stop or self.step % self.args.checkpoint_every == 0):
                    self.save_checkpoint()
                    if self.stop:
                        raise KeyboardInterrupt
        self.end_epoch()
        if self.stop:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """Let Ctrl-C end the training after a step and its checkpoint; a second one ends it at once.

        Several processes, which would have to stop at the same step, stop at once.
        """
        if self.processes.count > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: Any) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
            raise DivergedError(f"the loss became {loss} before step {self.step}: try a smaller --lr")
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
        try:
            self.model.load_state_dict(safetensors.load(self.weights.read_bytes()))
        except Exception as error:  # of safetensors, of torch: there is no common class
            reason = f"{self.weights} is damaged ({type(error).__name__})"
            raise InputError(f"{reason}: begin anew with --restart") from None
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
        write(self.out / "curves.png", png(figure))
