"""SRU beside an LSTM of equal size on the words of the Penn Treebank.

  python examples/experiments/language_modelling.py --data-dir DATA

Each encoder trains with several learning rates and is judged by the one with the best valid perplexity. Stopped at any
moment, the same command goes on where it was. When all runs are finished it writes language_modelling.json, .md and
.png to --out.
"""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

import train_lm  # noqa: E402
from common import InputError, machine, png, positive, tells_what_to_do, write  # noqa: E402
from lm_run import DivergedError, difference_of  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

ENCODERS = {
    "sru": ["--encoder", "sru", "--layers", "6", "--sru-version", "1", "--highway-bias", "-3"],
    "lstm": ["--encoder", "lstm", "--layers", "2"],
}
LEARNING_RATES = (0.004, 0.008, 0.016)

# Tao Lei et al., arXiv:1709.02755v1, language modelling: layers, parameters, valid and test perplexity after 300
# epochs, and seconds per epoch on a GeForce GTX 1070.
PUBLISHED = {"sru": (6, 24_000_000, 63.4, 60.3, 28), "lstm": (2, 24_000_000, 73.3, 71.4, 53)}


def command(encoder: str, rate: float, args: argparse.Namespace) -> list[str]:
    """Arguments of train_lm.py that all runs share, but for their length."""
    common = ["--dataset", "ptb", "--parameters", str(args.parameters), "--batch-size", "20", "--bptt", "35"]
    common += ["--dropout", "0.2", "--seed", "0", "--device", args.device]
    if args.data_dir:
        common += ["--data-dir", str(args.data_dir)]
    return [*ENCODERS[encoder], "--lr", str(rate), *common]


def finish(argv: list[str], out: Path) -> dict[str, Any] | None:
    """Train, unless it is done already, and return what train_lm.py has written; None if the loss diverges."""
    metrics = out / "metrics.json"
    if not is_finished(metrics, argv):
        # The lines go to a file beside the run; progress bars and errors to stderr as always.
        out.mkdir(parents=True, exist_ok=True)
        print(f"{out}: training", flush=True)
        with (out / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                status = train_lm.train(train_lm.parse_arguments([*argv, "--out", str(out)]))
            except DivergedError as error:
                print(f"{out}: {error}", file=sys.stderr)
                return None
        if status:
            raise KeyboardInterrupt  # which it has caught to keep what it has
    return read(metrics)


def read(metrics: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
        found["test_loss"], found["arguments"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{metrics} is damaged: delete its folder, or change --runs") from None
    return found


def is_finished(metrics: Path, argv: list[str]) -> bool:
    """Whether a finished run of the same arguments is there."""
    if not metrics.is_file():
        return False
    found = read(metrics)
    wanted = vars(train_lm.parse_arguments(argv))
    # With --parameters, the hidden size is what follows from it; some options are for the SRU alone.
    others = {"hidden"} if wanted["encoder"] == "sru" else {"hidden", "sru_version", "highway_bias"}
    compared = {name: value for name, value in wanted.items() if name not in train_lm.FREE | others}
    if difference := difference_of(found["arguments"], compared):
        raise InputError(f"{metrics.parent} holds a run of {difference}: change --runs")
    return found["test_loss"] is not None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured."""
    trained: dict[str, dict[float, dict[str, Any] | None]] = {encoder: {} for encoder in ENCODERS}
    for rate in LEARNING_RATES:
        for encoder, runs in trained.items():
            argv = [*command(encoder, rate, args), "--epochs", str(args.epochs)]
            runs[rate] = finish(argv, args.runs / f"{encoder}-{rate}")
    results, tried = {}, {}
    for encoder, runs in trained.items():
        finished = {rate: run for rate, run in runs.items() if run is not None}
        if not finished:
            raise InputError(f"{encoder} diverges at every learning rate")
        results[encoder] = min(finished.values(), key=lambda run: run["best_valid_loss"])
        tried[encoder] = dict.fromkeys(runs) | {
            rate: [math.exp(run["best_valid_loss"]), math.exp(run["test_loss"])] for rate, run in finished.items()
        }
    return {
        "machine": machine(),
        "valid_and_test_perplexity_of_learning_rates": tried,
        "runs": results,
        "holds": all(results["sru"][name] < results["lstm"][name] for name in ("best_valid_loss", "test_loss")),
    }


def page(measured: dict[str, Any]) -> str:
    """The results in words and tables."""
    runs = measured["runs"]
    sru, lstm = runs["sru"], runs["lstm"]
    epochs = len(sru["epochs"])
    verdict = "holds" if measured["holds"] else "does not hold"
    head = [
        "# SRU beside an LSTM of equal size: words of the Penn Treebank",
        "",
        "Written by `python examples/experiments/language_modelling.py --data-dir DATA --parameters "
        f"{sru['arguments']['parameters']} --epochs {epochs}`.",
        "",
        "**Claim: after equally many epochs, the perplexity of an SRU is below that of an LSTM with as many parameters."
        f" It {verdict}** here: test perplexity {perplexity(sru['test_loss'])} (SRU) and"
        f" {perplexity(lstm['test_loss'])} (LSTM) after {epochs} epochs, one run of each with its best learning rate.",
        "",
        "| | layers | units | parameters | learning rate | valid | test | CPU seconds per epoch |"
        " published: layers, parameters | published: valid | published: test | published: seconds per epoch |",
        "| --- |" + " ---: |" * 11,
    ]
    rows = []
    for encoder, metrics in runs.items():
        given = metrics["arguments"]
        layers, parameters, valid, test, seconds = PUBLISHED[encoder]
        cells = [encoder.upper(), given["layers"], given["hidden"], f"{metrics['parameters']:,}", given["lr"]]
        cells += [perplexity(metrics["best_valid_loss"]), perplexity(metrics["test_loss"])]
        cells += [f"{cpu_seconds(metrics):.0f}", f"{layers}, {parameters / 1e6:.0f} M", valid, test, seconds]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    published = [
        "",
        "Published: Tao Lei et al., arXiv:1709.02755v1: models nine times as large, 300 epochs, stronger dropout, SGD,"
        " on a GeForce GTX 1070. They are not figures to be reached here.",
        "",
        "## Valid perplexity after each epoch",
        "",
        "![Training loss and valid perplexity](language_modelling.png)",
        "",
        "| epoch | SRU | LSTM | SRU, training CPU seconds so far | LSTM, training CPU seconds so far |",
        "| ---: |" + " ---: |" * 4,
    ]
    spent = dict.fromkeys(runs, 0.0)
    for a, b in zip(sru["epochs"], lstm["epochs"], strict=True):
        for encoder, record in (("sru", a), ("lstm", b)):
            spent[encoder] += record["cpu_seconds"]
        cells = [a["epoch"], perplexity(a["valid_loss"]), perplexity(b["valid_loss"])]
        published.append("| " + " | ".join(map(str, [*cells, f"{spent['sru']:.0f}", f"{spent['lstm']:.0f}"])) + " |")
    rates = measured["valid_and_test_perplexity_of_learning_rates"]
    given = sru["arguments"]
    tail = [
        "",
        "## How it was measured",
        "",
        f"Both: embedding tied to the output layer, batches of {given['batch_size']} streams, {given['bptt']} words of"
        f" each per step, state carried on, dropout {given['dropout']} with one mask for all steps after the embedding,"
        f" between layers and before the output, Adam, cosine schedule over {epochs} epochs, gradients clipped at norm"
        f" {given['clip']}. The number of units is the largest multiple of 4 that keeps the model within"
        f" {given['parameters']:,} parameters. The SRU is of version {given['sru_version']}, with highway bias"
        f" {given['highway_bias']:g}. Perplexity is over the whole text, read as one stream; the weights are those of"
        " the epoch with the best valid perplexity. Nearly all of the time goes into the scores of the"
        f" {sru['symbols']:,} words, which both models have.",
        "",
        "All runs, of which the one with the best valid perplexity stands for its encoder above:",
        "",
        "| learning rate | SRU: valid | SRU: test | LSTM: valid | LSTM: test |",
        "| ---: |" + " ---: |" * 4,
        *(
            f"| {rate} | " + " | ".join(pair_of_perplexities(of_rates[rate]) for of_rates in rates.values()) + " |"
            for rate in rates["sru"]
        ),
        "",
        "CPU seconds are those of the process, in training alone; others used the machine meanwhile. "
        + ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
        + "; "
        + ", ".join(f"{name} {version}" for name, version in sru["versions"].items())
        + ".",
        "",
    ]
    return "\n".join([*head, *rows, *published, *tail])


def pair_of_perplexities(figures: list[float] | None) -> str:
    """Two cells: valid and test perplexity."""
    return "diverged | diverged" if figures is None else " | ".join(f"{figure:.2f}" for figure in figures)


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}"


def cpu_seconds(metrics: dict[str, Any]) -> float:
    return sum(record["cpu_seconds"] for record in metrics["epochs"]) / len(metrics["epochs"])


def draw(measured: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for encoder, metrics in measured["runs"].items():
        values = [math.exp(record["valid_loss"]) for record in metrics["epochs"]]
        seconds = [record["cpu_seconds"] for record in metrics["epochs"]]
        total = [sum(seconds[: i + 1]) / 60 for i in range(len(seconds))]
        label = f"{encoder.upper()}, {metrics['parameters'] / 1e6:.2f} M parameters"
        by_epoch.plot(range(1, len(values) + 1), values, marker=".", label=label)
        by_time.plot(total, values, marker=".", label=label)
    by_epoch.set(xlabel="epoch", ylabel="valid perplexity", yscale="log")
    by_time.set(xlabel="training time (CPU minutes)")
    by_epoch.legend()
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3, which="both")
    return png(figure, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    text = "folder with PTB/ptb.train.txt and so on [environment variable NUMSRU_DATA]"
    add("--data-dir", type=Path, metavar="DIR", help=text)
    add("--epochs", type=positive, default=5, metavar="N", help="passes over the training text [%(default)s]")
    text = "parameters that each model has at most [%(default)s]"
    add("--parameters", type=positive, default=2_660_000, metavar="N", help=text)
    add("--device", default="cpu", help="[%(default)s]")
    add("--runs", type=Path, default=Path("runs/language_modelling"), metavar="DIR", help="[%(default)s]")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="folder for the results [%(default)s]")
    args = parser.parse_args(argv)
    try:
        measured = run(args)
        args.out.mkdir(parents=True, exist_ok=True)
        for metrics in measured["runs"].values():
            # Folders of this machine tell a reader nothing.
            for name in ("data_dir", "out", "text"):
                metrics["arguments"].pop(name)
        write(args.out / "language_modelling.json", json.dumps(measured, indent=1) + "\n")
        write(args.out / "language_modelling.md", page(measured))
        write(args.out / "language_modelling.png", draw(measured))
    except (InputError, OSError, RuntimeError) as error:
        if not tells_what_to_do(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was")
        return 130
    print(f"{args.out / 'language_modelling.md'}: the claim {'holds' if measured['holds'] else 'does not hold'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
