"""The comparison of encoders: complete at a tiny size, also after being killed, and its page says what the runs say."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]

import classification  # noqa: E402
import classification_report  # noqa: E402
import forking  # noqa: E402

FILES = ["classification.json", "classification.md", "classification.png", "classification_time.png"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CR and SST-1, small and in random words, so that the accuracies differ."""
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(0)

    def lines(classes: int, each: int) -> str:
        return "".join(
            f"{n} {' '.join(f'w{words.randrange(20)}' for _ in range(6))}\n"
            for n in range(classes)
            for _ in range(each)
        )

    for name, text in {
        "CR/custrev.all": lines(2, 60),
        "SST/stsa.fine.train": lines(5, 12),
        "SST/stsa.fine.dev": lines(5, 4),
        "SST/stsa.fine.test": lines(5, 8),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def arguments(data, tmp_path):
    """Arguments of a table of two folds and two encoders, without --runs."""
    argv = [
        "--data-dir",
        data,
        "--datasets",
        "cr",
        "sst1",
        "--encoders",
        "lstm",
        "sru2",
        "--folds",
        "2",
        "--seeds",
        "2",
    ]
    argv += ["--epochs", "3", "--hidden", "8", "--embed", "8", "--results", tmp_path / "results"]
    return [str(argument) for argument in argv]


def accuracies(results: Path) -> dict:
    """All of a table but times."""
    sets = json.loads((results / "classification.json").read_text())["sets"]
    for encoders in sets.values():
        for figures in encoders.values():
            del figures["cpu_seconds_per_epoch"]
    return sets


def test_table_has_all_runs(capsys, arguments, tmp_path):
    assert classification.main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "8/8" in printed.out
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == FILES
    sets = accuracies(tmp_path / "results")
    assert {name: list(encoders) for name, encoders in sets.items()} == {
        "cr": ["lstm", "sru2"],
        "sst1": ["lstm", "sru2"],
    }
    assert sets["cr"]["sru2"]["runs"] == ["fold-0", "fold-1"]
    assert sets["sst1"]["lstm"]["runs"] == ["seed-0", "seed-1"]
    metrics = json.loads((tmp_path / "runs" / "cr" / "lstm" / "fold-1" / "metrics.json").read_text())
    assert sets["cr"]["lstm"]["test_accuracy"][1] == metrics["test_accuracy"]
    # The folds are tested on different sentences, which the figures must show.
    assert metrics["arguments"]["fold"] == 1
    text = (tmp_path / "results" / "classification.md").read_text()
    mean, std = (100 * sets["cr"]["sru2"][key] for key in ("mean", "std"))
    assert f"{mean:.1f} ± {std:.1f} | 79.8 | 78.3 |" in text
    assert "Runs: CR 2, SST-1 2." in text
    for name in ("checkpoint.pt", "weights.safetensors"):
        assert not list((tmp_path / "runs").glob(f"**/{name}"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork processes")
def test_table_killed_five_times_is_the_table_of_an_undisturbed_one(arguments, tmp_path):
    started = time.perf_counter()
    assert forking.finish(classification.main, [*arguments, "--runs", str(tmp_path / "undisturbed")]) == 0
    seconds = time.perf_counter() - started
    undisturbed = accuracies(tmp_path / "results")
    moments = random.Random(0)
    killed = [*arguments, "--runs", str(tmp_path / "killed")]
    for kill in range(5):
        process = forking.start(classification.main, killed)
        time.sleep(moments.uniform(0, 0.5 * seconds))
        while kill == 4 and process.is_alive() and not list((tmp_path / "killed").glob("*/*/*/metrics.json")):
            time.sleep(0.01)  # once at least when something is there
        process.kill()
        process.join()
    assert list((tmp_path / "killed").glob("*/*/*/metrics.json"))
    assert forking.finish(classification.main, killed) == 0
    assert accuracies(tmp_path / "results") == undisturbed


def test_table_of_two_processes_is_killed_with_them(arguments, tmp_path):
    arguments = [*arguments, "--datasets", "cr"]
    assert classification.main([*arguments, "--runs", str(tmp_path / "undisturbed")]) == 0
    undisturbed = accuracies(tmp_path / "results")
    command = [sys.executable, str(EXAMPLES / "experiments" / "classification.py"), *arguments, "--jobs", "2"]
    command += ["--runs", str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "1/4" in process.stdout.readline()
        process.kill()
        # Ends when nobody can write to it any more: the processes that trained are gone, too.
        process.stdout.read()
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert accuracies(tmp_path / "results") == undisturbed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to a single process")
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_loses_no_epoch_that_is_over(arguments, jobs, tmp_path):
    command = [sys.executable, str(EXAMPLES / "experiments" / "classification.py"), *arguments]
    command += ["--datasets", "cr", "--encoders", "lstm", "--epochs", "100000", "--patience", "100000"]
    command += ["--jobs", str(jobs), "--runs", str(tmp_path / "runs")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while len(list(tmp_path.glob("runs/cr/lstm/*/checkpoint.pt"))) < jobs:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all its processes get it
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert (process.returncode, error) == (130, "interrupted: the same command goes on from here\n")
    kept = sorted(path.parent.name for path in tmp_path.glob("runs/cr/lstm/*/checkpoint.pt"))
    assert kept == [f"fold-{n}" for n in range(jobs)]


def test_finished_runs_are_not_repeated(arguments, monkeypatch, tmp_path):
    argv = [*arguments, "--datasets", "cr", "--encoders", "lstm", "--runs", str(tmp_path / "runs")]
    assert classification.main(argv) == 0
    monkeypatch.setattr(classification.train_classifier, "train", None)
    assert classification.main(argv) == 0


def test_runs_of_another_recipe_are_refused(arguments, capsys, tmp_path):
    argv = [*arguments, "--datasets", "cr", "--encoders", "lstm", "--runs", str(tmp_path / "runs")]
    assert classification.main(argv) == 0
    capsys.readouterr()
    assert classification.main([*argv, "--hidden", "9", "--epochs", "4"]) == 2
    assert "hidden 8, not 9, epochs 3, not 4" in capsys.readouterr().err


def test_runs_of_two_recipes_are_not_one_table(arguments, capsys, tmp_path):
    argv = [*arguments, "--datasets", "cr", "--folds", "1", "--runs", str(tmp_path / "runs")]
    assert classification.main([*argv, "--encoders", "cnn"]) == 0
    assert classification.main([*argv, "--encoders", "lstm"]) == 0
    text = (tmp_path / "results" / "classification.md").read_text()
    assert " ± " not in text[text.index("## Accuracy") : text.index("Runs:")].split("\n\n", 2)[2]  # of single runs
    assert "--data-dir DATA --datasets cr --encoders cnn lstm --hidden 8 --embed 8" in text
    capsys.readouterr()
    assert classification.main([*argv, "--encoders", "sru2", "--limit", "9"]) == 2
    assert re.search(r"sru2/fold-0 has another recipe \(limit 9, not None\)", capsys.readouterr().err)


def test_times_of_two_calls_are_joined(arguments, tmp_path):
    argv = [*arguments, "--datasets", "cr", "--runs", str(tmp_path / "runs")]
    for _ in range(2):
        assert classification.main([*argv, "--time", "--rounds", "2"]) == 0
    assert classification.main([*argv, "--encoders", "lstm", "sru2"]) == 0
    record = json.loads((tmp_path / "runs" / "cr" / "time.json").read_text())
    assert {name: len(seconds) for name, seconds in record["seconds"].items()} == {"lstm": 4, "sru2": 4}
    text = (tmp_path / "results" / "classification.md").read_text()
    assert re.search(r"^\| CR \| 4 \| \d+\.\d\d \| \d+\.\d\d \| \d+\.\d\d \|$", text, re.MULTILINE)


def test_unequal_runs_are_said(arguments, tmp_path):
    argv = [*arguments, "--datasets", "cr", "--runs", str(tmp_path / "runs")]
    assert classification.main([*argv, "--encoders", "lstm"]) == 0
    assert classification.main([*argv, "--encoders", "sru2", "--folds", "1"]) == 0
    text = (tmp_path / "results" / "classification.md").read_text()
    assert "Runs: CR 1 to 2. **Not all encoders have all runs yet**" in text


def table_of(**tests: list[float]) -> dict:
    runs = [f"fold-{n}" for n in range(3)]
    return {
        encoder: {"runs": runs, "test_accuracy": values, "dev_accuracy": values, "mean": sum(values) / 3}
        for encoder, values in tests.items()
    }


@pytest.mark.parametrize(
    ("sru", "holds"), [([0.8, 0.8, 0.8], True), ([0.70, 0.72, 0.69], False), ([0.74, 0.78, 0.73], True)]
)
def test_claim_is_judged_by_the_runs(sru, holds):
    sets = {"mr": table_of(lstm=[0.75, 0.76, 0.76], sru2=sru)}
    against_lstm, reaches = classification_report.claims(sets)
    assert against_lstm["holds"] is holds
    assert reaches["holds"] is (sum(sru) / 3 >= 0.75)


def test_development_split_chooses_the_depth():
    encoders = table_of(sru1=[0.9] * 3, sru2=[0.7] * 3, sru4=[0.6] * 3)
    encoders["sru4"]["dev_accuracy"] = [0.8] * 3
    assert classification_report.best_stacked(encoders) == "sru4"


def test_no_runs_is_one_line(capsys, tmp_path):
    assert classification.main(["--report", "--runs", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: there is no finished run below .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no file .*custrev.all"),
        ({"CR/custrev.all": b""}, "custrev.all is empty"),
        ({"CR/custrev.all": "1 good\n".encode("utf-16")}, "is not utf-8 or latin-1 text"),
        ({"CR/custrev.all": b"1 good\n2 bad\n"}, "line 2: the label is '2', expected 0 to 1"),
    ],
)
def test_bad_data_is_one_line(capsys, tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    argv = ["--datasets", "cr", "--data-dir", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert classification.main(argv) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)


def test_bad_data_of_two_processes_is_one_line(capsys, tmp_path):
    argv = ["--datasets", "cr", "--data-dir", str(tmp_path), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    assert classification.main(argv) == 2
    assert re.fullmatch(r"error: there is no file .*custrev.all.*\n", capsys.readouterr().err)
