"""Compare encoders of sentences: CNN, LSTM, GRU and SRU of 1 to 8 layers on the usual data sets, in one table.

  python examples/experiments/classification.py --data-dir DATA --jobs 2

Ten-fold cross-validation, or several seeds where the test split is given. Every run has a folder below --runs: what is
finished is not repeated, what was killed goes on from its last epoch. When all are there, and with --report at any
time before, the table is written to --results: classification.json, .md and .png.

  python examples/experiments/classification.py --data-dir DATA --time

measures the training time per epoch, the encoders taking turns; do this while nothing else runs.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

# One thread for a run: its figures are the same to the last bit wherever it is cut off.
os.environ.setdefault("OMP_NUM_THREADS", "1")
EXAMPLES = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]

import classification_report  # noqa: E402
import sentence_data  # noqa: E402
import torch  # noqa: E402
import train_classifier  # noqa: E402
from common import InputError, positive  # noqa: E402

ENCODERS = {
    "cnn": ["--encoder", "cnn"],
    "lstm": ["--encoder", "lstm", "--layers", "1"],
    "gru": ["--encoder", "gru", "--layers", "1"],
    **{f"sru{n}": ["--encoder", "sru", "--layers", str(n)] for n in (1, 2, 4, 8)},
    **{f"sru{n}-v2": ["--encoder", "sru", "--layers", str(n), "--sru-version", "2"] for n in (1, 2, 4, 8)},
}
CNN_MAPS = 100


@dataclass(frozen=True)
class Job:
    """One run of the table: an encoder on one fold or, of a given split, with one seed."""

    dataset: str
    encoder: str
    number: int
    recipe: tuple[str, ...]
    runs: Path

    @property
    def out(self) -> Path:
        kind = "fold" if sentence_data.CORPORA[self.dataset].cross_validated else "seed"
        return self.runs / self.dataset / self.encoder / f"{kind}-{self.number}"

    def arguments(self) -> list[str]:
        """The command line of `train_classifier.py` that this run is."""
        fold = ["--fold", str(self.number)] if sentence_data.CORPORA[self.dataset].cross_validated else []
        maps = ["--hidden", str(CNN_MAPS)] if self.encoder == "cnn" else []
        return [
            *("--dataset", self.dataset, *ENCODERS[self.encoder], *self.recipe, *maps),
            *(*fold, "--seed", str(self.number), "--device", "cpu", "--resume", "--out", str(self.out)),
        ]


def recipe_of(args: argparse.Namespace) -> tuple[str, ...]:
    names = ("epochs", "patience", "hidden", "embed", "batch_size", "lr", "dropout", "limit", "data_dir")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return ("--sparse", *(text for name, v in options.items() for text in (f"--{name.replace('_', '-')}", str(v))))


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All runs: first every encoder and data set on one fold, then on the next, so that the table can be cut off."""
    return [
        Job(dataset, encoder, number, recipe_of(args), args.runs)
        for number in range(max(args.folds, args.seeds))
        for dataset in args.datasets
        if number < (args.folds if sentence_data.CORPORA[dataset].cross_validated else args.seeds)
        for encoder in args.encoders
    ]


def run(job: Job) -> str:
    """Train, from the last checkpoint on if there is one. What the run prints goes to a file in its folder."""
    torch.set_num_threads(1)
    arguments = train_classifier.parse_arguments(job.arguments())
    if not train_classifier.is_finished(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        with (job.out / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            if train_classifier.train(arguments):
                raise KeyboardInterrupt  # which it has caught to keep what it has
    metrics = train_classifier.recorded(job.out)
    wanted = train_classifier.configuration(arguments) | {"epochs": arguments.epochs, "patience": arguments.patience}
    given = {name: metrics["arguments"].get(name) for name in wanted}
    difference = train_classifier.difference_of(given, wanted)
    if difference:
        raise InputError(f"{job.out} holds a run with {difference}: give the same arguments, or change --runs")
    # Hundreds of runs would fill a disk with embeddings, and the table needs none of them.
    for name in ("checkpoint.pt", "weights.safetensors", "vocabulary.json"):
        (job.out / name).unlink(missing_ok=True)
    return f"{job.out}: test accuracy {metrics['test_accuracy']:.4f} after {len(metrics['epochs'])} epochs"


def die_with_parent() -> None:
    """End this process when the one that started it is gone, even killed: a second start must find the folders free."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while it waits for a job
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


stopped = threading.Event()


def run_in_pool(job: Job) -> str:
    """`run`, of which Ctrl-C ends this job and keeps the next ones, which may have been handed out, from beginning."""
    if stopped.is_set():
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(job)
    except KeyboardInterrupt:
        stopped.set()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_all(jobs: list[Job], processes: int) -> Iterator[str]:
    if processes == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        try:
            yield from pool.map(run_in_pool, jobs)
        except KeyboardInterrupt:
            for process in active_children():  # a terminal has told them already, others may not
                os.kill(process.pid, signal.SIGINT)
            pool.shutdown(cancel_futures=True)
            raise


def time_epochs(dataset: str, args: argparse.Namespace) -> None:
    """Time training epochs of every encoder, in turns, and add the seconds to those of earlier calls."""
    torch.set_num_threads(1)
    runs = {}
    for encoder in args.encoders:
        arguments = train_classifier.parse_arguments(Job(dataset, encoder, 0, recipe_of(args), args.runs).arguments())
        torch.manual_seed(0)
        task = train_classifier.load_task(arguments)
        run, examples = train_classifier.Run(task, arguments), task.train
        # What is compiled and allocated on first use belongs to no epoch.
        task.train = examples.first(20 * arguments.batch_size)
        run.train_epoch(0)
        task.train = examples
        runs[encoder] = run
    seconds: dict[str, list[float]] = {encoder: [] for encoder in runs}
    for _ in range(args.rounds):
        for encoder, run in runs.items():
            started = time.perf_counter()
            run.train_epoch(1)
            seconds[encoder].append(round(time.perf_counter() - started, 3))
    classification_report.add_times(args.runs / dataset / "time.json", recipe_of(args), seconds)
    print(f"{dataset}: " + ", ".join(f"{name} {values} s" for name, values in seconds.items()), flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    text = f"of {', '.join(sentence_data.CORPORA)} [cr mr subj sst1]"
    add(
        "--datasets",
        nargs="+",
        choices=sentence_data.CORPORA,
        default=["cr", "mr", "subj", "sst1"],
        metavar="SET",
        help=text,
    )
    encoders = ["cnn", "lstm", "gru", "sru1", "sru2", "sru4", "sru8"]
    text = f"of {', '.join(ENCODERS)}; v2 are the second paper's equations [{' '.join(encoders)}]"
    add("--encoders", nargs="+", choices=ENCODERS, default=encoders, metavar="ENCODER", help=text)
    add(
        "--folds",
        type=int,
        choices=range(1, sentence_data.FOLDS + 1),
        default=sentence_data.FOLDS,
        metavar="N",
        help="the first N of ten folds [%(default)s]",
    )
    add("--seeds", type=positive, default=5, metavar="N", help="runs where the test split is given [%(default)s]")
    data_dir = os.environ.get("NUMSRU_DATA")
    add(
        "--data-dir",
        type=Path,
        default=data_dir,
        metavar="DIR",
        help="as for train_classifier.py [environment variable NUMSRU_DATA]",
    )

    add = parser.add_argument_group("recipe, the same for all").add_argument
    add(
        "--hidden",
        type=positive,
        default=100,
        metavar="N",
        help="units of a layer; the CNN has 100 maps of each width [%(default)s]",
    )
    add("--embed", type=positive, default=300, metavar="N", help="size of the embedding [%(default)s]")
    add("--dropout", type=float, default=0.5, metavar="P", help="[%(default)s]")
    add("--epochs", type=positive, default=8, metavar="N", help="largest number of epochs [%(default)s]")
    add("--patience", type=positive, default=3, metavar="N", help="epochs without a better dev accuracy [%(default)s]")
    add("--batch-size", type=positive, default=32, metavar="N", help="[%(default)s]")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam [%(default)s]")
    add("--limit", type=positive, metavar="N", help="train on N examples only, to try the program out [all]")

    add = parser.add_argument_group("how").add_argument
    add("--jobs", type=positive, default=1, metavar="N", help="runs at once, each on one thread [%(default)s]")
    add(
        "--runs", type=Path, default=Path("runs/classification"), metavar="DIR", help="folder of the runs [%(default)s]"
    )
    add(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of the table [%(default)s]",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--report", action="store_true", help="write the table of the runs there are, and train nothing")
    mode.add_argument("--time", action="store_true", help="measure seconds per epoch, the encoders in turns")
    add("--rounds", type=positive, default=3, metavar="N", help="epochs that --time measures [%(default)s]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.time:
            for dataset in args.datasets:
                time_epochs(dataset, args)
            print("--report puts them on the page")
            return 0
        if not args.report:
            jobs = jobs_of(args)
            for done, line in enumerate(run_all(jobs, args.jobs), start=1):
                print(f"{done}/{len(jobs)} {line}", flush=True)
        classification_report.write(args.runs, args.results)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a process was killed, for want of memory perhaps: the same command goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
