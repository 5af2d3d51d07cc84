"""The page of the comparison of encoders: what the runs in a folder say, as JSON, Markdown and pictures."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classifier_model import Convolution, Recurrent
from common import InputError, machine, png
from common import write as write_file
from matplotlib.figure import Figure
from run_files import difference_of, is_finished, recorded
from sentence_data import CORPORA

NAMES = {"mr": "MR", "cr": "CR", "subj": "Subj", "mpqa": "MPQA", "trec": "TREC", "sst1": "SST-1", "sst2": "SST-2"}
ORDER = ("cnn", "lstm", "gru", "sru1", "sru2", "sru4", "sru8", "sru1-v2", "sru2-v2", "sru4-v2", "sru8-v2")

# Test accuracies in percent of convolutional networks that also learn their word vectors from the training set alone.
# SST there: trained on the phrases of the sentences, too, which gives several points more.
PUBLISHED = {
    "Kim 2014, CNN-rand": {
        "mr": 76.1, "sst1": 45.0, "sst2": 82.7, "subj": 89.6, "trec": 91.2, "cr": 79.8, "mpqa": 83.4,
    },
    "sent-conv-torch, rand": {
        "mr": 75.9, "sst1": 42.2, "sst2": 83.5, "subj": 89.2, "trec": 88.2, "cr": 78.3, "mpqa": 84.6,
    },
}  # fmt: skip
TARGETS = {"mr": 0.75, "subj": 0.89, "cr": 0.78}


def add_times(path: Path, recipe: Sequence[str], seconds: dict[str, list[float]]) -> None:
    """Add measured seconds to the file of a data set; those of another recipe are replaced."""
    record: dict[str, Any] = {"recipe": list(recipe), "machine": describe_machine(), "seconds": {}}
    if path.exists() and (earlier := json.loads(path.read_text()))["recipe"] == record["recipe"]:
        record["seconds"] = earlier["seconds"]
    for encoder, values in seconds.items():
        record["seconds"][encoder] = record["seconds"].get(encoder, []) + values
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(record, indent=2))


def describe_machine() -> str:
    found = machine()
    return f"{found['processor']}, {found['cores']} cores, {found['system']}"


def write(runs: Path, results: Path) -> None:
    """Write classification.json, .md and the two pictures of all finished runs below `runs`."""
    summary = summarize(runs)
    results.mkdir(parents=True, exist_ok=True)
    write_file(results / "classification.json", json.dumps(summary, indent=1) + "\n")
    write_file(results / "classification.md", page(summary))
    write_file(results / "classification.png", picture(summary["sets"], draw_accuracies))
    write_file(results / "classification_time.png", picture(summary["sets"], draw_progress))
    print(f"written: {results / 'classification.md'}")


def summarize(runs: Path) -> dict[str, Any]:
    """The figures of all finished runs, by data set and encoder, and the claims that they support or refute."""
    sets: dict[str, Any] = {}
    some: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for dataset, encoder in itertools.product(CORPORA, ORDER):
        folders = [folder for folder in (runs / dataset / encoder).glob("*-*") if is_finished(folder)]
        if not folders:
            continue
        folders.sort(key=lambda folder: int(folder.name.split("-")[1]))
        metrics = [recorded(folder) for folder in folders]
        for folder, run in zip(folders, metrics, strict=True):
            same = recipe_of(run)
            if difference := difference_of(same, {name: recipe.get(name, value) for name, value in same.items()}):
                raise InputError(f"{folder} has another recipe ({difference}): give each recipe --runs of its own")
            recipe |= same
        some = metrics[0]
        sets.setdefault(dataset, {})[encoder] = figures(folders, metrics)
    if not sets:
        raise InputError(f"there is no finished run below {runs}: give the folder of the runs with --runs")
    times = {d: json.loads((runs / d / "time.json").read_text()) for d in sets if (runs / d / "time.json").exists()}
    return {
        "machine": describe_machine(),
        "versions": some["versions"],
        "recipe": recipe,
        "sets": sets,
        "times": {dataset: record["seconds"] for dataset, record in times.items()},
        "claims": claims(sets),
    }


def recipe_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run that are to be the same for all encoders, but for the CNN's number of maps."""
    arguments = metrics["arguments"]
    names = ("embed", "dropout", "batch_size", "optimizer", "lr", "sparse", "epochs", "patience", "limit")
    hidden = {} if arguments["encoder"] == "cnn" else {"hidden": arguments["hidden"]}
    return {name: arguments[name] for name in names} | hidden


def figures(folders: list[Path], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table needs of the runs of one encoder on one data set."""
    epochs = [epoch for run in metrics for epoch in run["epochs"]]
    tests = [run["test_accuracy"] for run in metrics]
    return {
        "runs": [folder.name for folder in folders],
        "test_accuracy": tests,
        "mean": statistics.fmean(tests),
        "std": statistics.stdev(tests) if len(tests) > 1 else None,
        "dev_accuracy": [run["best_dev_accuracy"] for run in metrics],
        "dev_accuracy_by_epoch": [[epoch["dev_accuracy"] for epoch in run["epochs"]] for run in metrics],
        "best_epoch": [run["best_epoch"] for run in metrics],
        "parameters": [run["parameters"] for run in metrics],
        "encoder_parameters": encoder_parameters(metrics[0]["arguments"]),
        "cpu_seconds_per_epoch": statistics.median(epoch["train_cpu_seconds"] for epoch in epochs),
    }


def encoder_parameters(arguments: dict[str, Any]) -> int:
    """Numbers that the encoder learns, without embedding and classifier."""
    kind, embed, hidden = (arguments[name] for name in ("encoder", "embed", "hidden"))
    if kind == "cnn":
        return sum(p.numel() for p in Convolution(embed, hidden).parameters())
    encoder = Recurrent(kind, embed, hidden, arguments["layers"], 0.0, arguments["sru_version"])
    return sum(p.numel() for p in encoder.parameters())


def claims(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed of the SRU, whether it holds, and the figures that decide."""
    found = []
    stacked = {dataset: best_stacked(encoders) for dataset, encoders in sets.items()}
    for other in ("lstm", "cnn"):
        compared = [d for d, of in sets.items() if stacked[d] and len(common(of[stacked[d]], of.get(other))) > 1]
        if not compared:
            continue
        differences = {d: paired(sets[d][stacked[d]], sets[d][other]) for d in compared}
        held = [d for d, (mean, error) in differences.items() if mean + 2 * error >= 0]
        details = [
            f"{NAMES[d]}: {label(stacked[d])} {100 * mean:+.1f} ± {100 * error:.1f}"
            for d, (mean, error) in differences.items()
        ]
        found.append({
            "claim": f"SRU of 2 layers or more is above {label(other)}, or below by less than two standard errors, "
            "on at least three quarters of the sets",
            "holds": len(held) >= 0.75 * len(compared),
            "figures": f"on {len(held)} of {len(compared)}; {', '.join(details)} points",
        })  # fmt: skip
    for dataset, target in TARGETS.items():
        if dataset in sets and stacked[dataset]:
            of = sets[dataset][stacked[dataset]]
            found.append({
                "claim": f"{NAMES[dataset]}: SRU of 2 layers or more reaches {target:.2f}",
                "holds": of["mean"] >= target,
                "figures": f"{label(stacked[dataset])} {of['mean']:.4f} in {len(of['runs'])} runs",
            })  # fmt: skip
    return found


def best_stacked(encoders: dict[str, Any]) -> str:
    """The SRU of 2 layers or more that is best on the development splits: the test splits choose nothing."""
    names = [name for name in encoders if name.startswith("sru") and not name.startswith("sru1")]
    return max(names, key=lambda name: statistics.fmean(encoders[name]["dev_accuracy"]), default="")


def paired(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean of the differences of test accuracy over the runs that both have, two at least, and its standard error."""
    tests = [dict(zip(of["runs"], of["test_accuracy"], strict=True)) for of in (one, other)]
    differences = [tests[0][run] - tests[1][run] for run in common(one, other)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def common(one: dict[str, Any], other: dict[str, Any] | None) -> list[str]:
    """The folds or seeds that both have."""
    return [run for run in one["runs"] if other and run in other["runs"]]


def label(encoder: str) -> str:
    if not encoder.startswith("sru"):
        return encoder.upper()
    layers, _, version = encoder.removeprefix("sru").partition("-")
    return f"SRU-{layers}" + (f" {version}" if version else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(summary: dict[str, Any]) -> str:
    """The Markdown page."""
    sets, recipe = summary["sets"], summary["recipe"]
    encoders = [name for name in ORDER if any(name in of for of in sets.values())]
    accuracies = [
        [
            NAMES[dataset],
            *(accuracy_cell(of.get(encoder)) for encoder in encoders),
            *(f"{figures[dataset]:.1f}" for figures in PUBLISHED.values()),
        ]
        for dataset, of in sets.items()
    ]
    counts = {dataset: sorted({len(of["runs"]) for of in encoders.values()}) for dataset, encoders in sets.items()}
    sizes = [
        [
            label(encoder),
            f"{next(of[encoder]['encoder_parameters'] for of in sets.values() if encoder in of):,}",
            *(f"{of[encoder]['cpu_seconds_per_epoch']:.1f}" if encoder in of else "" for of in sets.values()),
        ]
        for encoder in encoders
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    limit = f", {recipe['limit']} training examples" if recipe["limit"] else ""
    parts = [
        "# Sentence classification: SRU, LSTM and CNN",
        f"Made on {summary['machine']}, one thread a run, with {versions}, by",
        f"    {command(sets, recipe)}",
        f"Recipe, the same for all: random word vectors of size {recipe['embed']}, {recipe.get('hidden', '')} units in "
        "a layer (CNN: 100 maps of each of the widths 3, 4 and 5), dropout "
        f"{recipe['dropout']}, {recipe['optimizer'].title()} at {recipe['lr']}, word vectors by SparseAdam, batches of "
        f"{recipe['batch_size']}, at most {recipe['epochs']} epochs{limit}. The weights of the epoch that is best on "
        f"the development split are tested, and training ends {recipe['patience']} epochs after it. SRU-n: n layers, "
        "equations of the first paper; v2: of the second.",
        "## Accuracy",
        "Test accuracy in percent: mean ± standard deviation over the folds of ten-fold cross-validation or, on sets "
        "with a given test split, over seeds. The last columns are published figures of CNNs with random word vectors; "
        "on SST theirs are trained on phrases, too, which the others here are not.",
        table(["", *map(label, encoders), *PUBLISHED], accuracies),
        "Runs: " + ", ".join(f"{NAMES[d]} {' to '.join(map(str, n[:1] + n[1:][-1:]))}" for d, n in counts.items()) + "."
        + ("" if complete(sets) else " **Not all encoders have all runs yet**: compare with care."),
        "![Accuracies](classification.png)",
        "## Claims",
        "Of the SRUs with 2 layers or more, the one that is best on the development splits is judged. Differences are "
        "paired by fold: mean ± standard error.",
        table(["claim", "holds", "figures"], [[c["claim"], "yes" if c["holds"] else "**no**", c["figures"]]
              for c in summary["claims"]]).replace("---:", "---"),
        "## Size and time",
        "Parameters of the encoder, without word vectors and classifier, and processor seconds of a training epoch "
        "(median; other programs were running).",
        table(["", "parameters", *(NAMES[dataset] for dataset in sets)], sizes),
        *timing(summary["times"]),
        "Development accuracy, the best so far and the mean over the folds, against training time, epoch by epoch:",
        "![Development accuracy against training time](classification_time.png)",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def command(sets: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The command line that makes these runs, all folds and seeds of them."""
    encoders = [name for name in ORDER if any(name in of for of in sets.values())]
    names = ("hidden", "embed", "batch_size", "lr", "dropout", "epochs", "patience", "limit")
    options = [f"--{name.replace('_', '-')} {recipe[name]}" for name in names if recipe.get(name) is not None]
    return " ".join([
        "python examples/experiments/classification.py --data-dir DATA",
        f"--datasets {' '.join(sets)} --encoders {' '.join(encoders)}", *options,
    ])  # fmt: skip


def accuracy_cell(of: dict[str, Any] | None) -> str:
    if not of:
        return ""
    return f"{100 * of['mean']:.1f}" + ("" if of["std"] is None else f" ± {100 * of['std']:.1f}")


def complete(sets: dict[str, Any]) -> bool:
    return all(len({len(of["runs"]) for of in encoders.values()}) == 1 for encoders in sets.values())


def timing(times: dict[str, dict[str, list[float]]]) -> list[str]:
    """The part of the page on measured times, where there are any."""
    if not times:
        return []
    encoders = [name for name in ORDER if any(name in seconds for seconds in times.values())]
    rows = []
    for dataset, seconds in times.items():
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = f"{medians['lstm'] / medians['sru2']:.2f}" if {"lstm", "sru2"} <= set(medians) else ""
        cells = (f"{medians[name]:.2f}" if name in medians else "" for name in encoders)
        rows.append([NAMES[dataset], str(len(next(iter(seconds.values())))), *cells, ratio])
    return [
        "Seconds of a training epoch, the encoders in turns on an otherwise idle machine, median of the rounds:",
        table(["", "rounds", *map(label, encoders), "LSTM / SRU-2"], rows),
    ]


def picture(sets: dict[str, Any], draw: Any) -> bytes:
    """One panel for each data set."""
    figure = Figure(figsize=(3.4 * len(sets), 3.4), layout="constrained")
    for axes, (dataset, encoders) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        draw(axes, dataset, encoders)
        axes.set_title(NAMES[dataset])
    return png(figure, dpi=110)


def draw_accuracies(axes: Any, dataset: str, encoders: dict[str, Any]) -> None:
    means, stds = ([100 * (of[key] or 0.0) for of in encoders.values()] for key in ("mean", "std"))
    axes.errorbar(range(len(encoders)), means, stds, fmt="o", capsize=3)
    for style, (name, figures) in zip(("--", ":"), PUBLISHED.items(), strict=True):
        axes.axhline(figures[dataset], color="gray", linestyle=style, linewidth=1, label=name)
    axes.set_xticks(range(len(encoders)), map(label, encoders), rotation=45)
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize="x-small")


def draw_progress(axes: Any, dataset: str, encoders: dict[str, Any]) -> None:
    for encoder, of in encoders.items():
        longest = max(map(len, of["dev_accuracy_by_epoch"]))
        # A run that has stopped keeps its best accuracy.
        best = [list(itertools.accumulate(run, max)) for run in of["dev_accuracy_by_epoch"]]
        means = [100 * statistics.fmean(run[min(i, len(run) - 1)] for run in best) for i in range(longest)]
        times = [of["cpu_seconds_per_epoch"] * (i + 1) for i in range(longest)]
        axes.plot(times, means, marker=".", label=label(encoder))
    axes.set(xlabel="training time, s", ylabel="dev accuracy, %")
    axes.legend(fontsize="x-small")
