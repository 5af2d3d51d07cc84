"""The classification example runs, small, with every encoder and data set; its errors say what to do."""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import forking  # noqa: E402
import numpy as np  # noqa: E402
import sentence_data  # noqa: E402
import train_classifier  # noqa: E402
import word_vectors  # noqa: E402
from example_runs import check_files, read_error  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_data import CORPORA, InputError  # noqa: E402

ENCODERS = ["sru", "lstm", "gru", "cnn"]
TWO_CLASSES = sentence_data.Corpus("MR", ("small.all",), 2, "nobody/nothing")
SMALL = ["--epochs", "1", "--hidden", "8", "--embed", "8", "--limit", "64", "--device", "cpu"]


@pytest.fixture
def write(tmp_path):
    """Write bytes to a file and return its path."""

    def write_bytes(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write_bytes


@pytest.fixture
def real_data():
    """The folder of the real data sets."""
    if "NUMSRU_DATA" not in os.environ:
        pytest.skip("the environment variable NUMSRU_DATA does not name the folder of the data sets")
    return Path(os.environ["NUMSRU_DATA"])


def lines(classes: int, each: int) -> bytes:
    """A data set in which the second word gives the class away, sorted by class as the real ones are."""
    return b"".join(f"{n} the word{n} number {i}\n".encode() for n in range(classes) for i in range(each))


def error_of(capsys, *argv) -> str:
    """The one line that a run with these arguments leaves on stderr, along with exit status 2."""
    printed, error = read_error(capsys, train_classifier.main, *argv)
    assert printed == ""
    return error


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A gorgeous, witty film!", ["a", "gorgeous", ",", "witty", "film", "!"]),
        ("It's what they've said: don't", ["it", "'s", "what", "they", "'ve", "said", "do", "n't"]),
        ("it 's does n't", ["it", "'s", "does", "n't"]),
        ("well-made -lrb- 1999 -rrb- ...", ["well", "made", "(", "1999", ")"]),
        ("'quoted' rock 'n' roll", ["quoted", "rock", "n", "roll"]),
        ("naïve\x85clichéd", ["naïve", "clichéd"]),
        ("", []),
        ("-- . ;", []),
    ],
)
def test_tokenize(text, tokens):
    assert sentence_data.tokenize(text) == tokens


def test_latin_1_file_is_split_at_newlines_only(write):
    path = write("small.all", b"1 clich\xe9d \x85 film\n0 bad\n")
    split = sentence_data.read(path, TWO_CLASSES)
    assert split.sentences == [["clichéd", "film"], ["bad"]]
    assert split.labels == [1, 0]


def test_utf_8_file_is_not_taken_for_latin_1(write):
    path = write("small.all", "\ufeff1 clichéd\r\n0 bad\r\n\r\n".encode())
    assert sentence_data.read(path, TWO_CLASSES).sentences == [["clichéd"], ["bad"]]


def test_sentence_without_words_is_one_unknown_word(write):
    split = sentence_data.read(write("small.all", b"1 --\n0\n1 word\n"), TWO_CLASSES)
    assert split.sentences == [[], [], ["word"]]
    vocabulary = sentence_data.build_vocabulary(split.sentences)
    assert [sentence_data.encode(sentence, vocabulary) for sentence in split.sentences] == [[1], [1], [2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"1 good\n2 bad\n", "line 2: the label is '2', expected 0 to 1"),
        (b"-1 bad\n", "line 1: the label is '-1', expected 0 to 1"),
        (b"a sentence without label\n", "line 1: the label is 'a', expected 0 to 1"),
        ("1 good\n".encode("utf-16"), "is not utf-8 or latin-1 text"),
    ],
)
def test_bad_file_is_refused(write, data, message):
    with pytest.raises(InputError, match=message):
        sentence_data.read(write("small.all", data), TWO_CLASSES)


def test_sst_in_latin_1_is_refused(write):
    with pytest.raises(InputError, match="is not utf-8 text: convert it"):
        sentence_data.read(write("stsa.fine.train", b"1 clich\xe9d\n"), CORPORA["sst1"])


def test_folds_partition_the_data():
    labels = [0] * 150 + [1] * 50
    tested = []
    for fold in range(10):
        train, dev, test = sentence_data.fold_indices(labels, 2, fold)
        assert sorted([*train, *dev, *test]) == list(range(200))
        assert sum(labels[i] for i in test) == 5
        tested += list(test)
    assert sorted(tested) == list(range(200))


def test_vocabulary_is_numbered_by_frequency():
    vocabulary = sentence_data.build_vocabulary([["b", "a"], ["a", "c"]])
    assert vocabulary == {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}


def test_vocabulary_is_of_the_training_split_only(write, tmp_path):
    write("TREC/TREC.train.all", lines(6, 12))
    write("TREC/TREC.test.all", b"0 unheard\n")
    args = train_classifier.parse_arguments(["--dataset", "trec", "--data-dir", str(tmp_path)])
    task = train_classifier.load_sentences(args)
    assert "unheard" not in task.vocabulary
    assert task.test.sequences[0].tolist() == [sentence_data.UNKNOWN]


def test_hub_parts_are_joined_for_cross_validation(monkeypatch):
    def part(texts: list[str], labels: list[int]) -> SimpleNamespace:
        columns = {"sentence": texts, "label": labels}
        return type("Part", (dict,), {"column_names": list(columns)})(columns)

    datasets = ModuleType("datasets")
    datasets.load_dataset = lambda name: {"train": part(["Good!"], [1]), "test": part(["Bad"], [0])}
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    assert sentence_data.fetch("mpqa") == [sentence_data.Split([["good", "!"], ["bad"]], [1, 0])]
    with pytest.raises(InputError, match="has 2 splits, expected 3"):
        sentence_data.fetch("sst2")


def test_missing_datasets_library_names_both_ways_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("NUMSRU_DATA", raising=False)
    message = error_of(capsys, "--dataset", "mr")
    assert "--data-dir" in message
    assert "pip install datasets" in message


def test_missing_network_names_both_ways_out(monkeypatch, capsys):
    def load_dataset(name: str) -> None:
        raise ConnectionError("cannot reach the hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("NUMSRU_DATA", raising=False)
    message = error_of(capsys, "--dataset", "mr")
    assert "cannot reach the hub" in message
    assert "--data-dir" in message


def test_missing_folder_is_one_line(capsys, tmp_path):
    assert "there is no folder" in error_of(capsys, "--dataset", "mr", "--data-dir", tmp_path / "nowhere")


def test_missing_file_is_one_line(capsys, tmp_path):
    assert "rt-polarity.all" in error_of(capsys, "--dataset", "mr", "--data-dir", tmp_path)


def test_too_few_examples_of_a_class_is_one_line(capsys, write, tmp_path):
    write("MR/rt-polarity.all", lines(1, 30))
    assert "class 1 has 0 examples" in error_of(capsys, "--dataset", "mr", "--data-dir", tmp_path)


def test_fold_of_a_set_with_a_test_split_is_one_line(capsys, tmp_path):
    assert "leave --fold out" in error_of(capsys, "--dataset", "trec", "--data-dir", tmp_path, "--fold", "3")


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99"])
def test_unusable_device_is_one_line(capsys, device):
    assert "try --device cpu" in error_of(capsys, "--device", device, "--encoder", "gru")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_one_line(capsys):
    assert "--device cuda does not work" in error_of(capsys, "--device", "cuda", "--encoder", "gru")


def test_missing_package_is_one_line():
    blocked = "import sys; sys.modules['tqdm'] = None; import train_classifier"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=EXAMPLES)
    assert done.returncode == 2
    todo = "run `pip install -e '.[examples]'` in the folder above examples"
    assert done.stderr == f"error: no module tqdm: {todo}\n"


def test_out_that_is_a_file_is_one_line(capsys, write):
    assert train_classifier.main([*SMALL, "--encoder", "gru", "--out", str(write("taken", b""))]) == 2
    assert re.fullmatch(r"error: .*taken.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_digits_run_writes_its_files(capsys, tmp_path, encoder):
    assert train_classifier.main([*SMALL, "--encoder", encoder, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    last = re.fullmatch(r"test accuracy: (\d\.\d{4})", printed.out.splitlines()[-1])
    names = {"epoch", "train_loss", "train_accuracy", "dev_accuracy", "seconds", "train_cpu_seconds"}
    metrics = check_files(tmp_path, encoder, names)
    assert last[1] == f"{metrics['test_accuracy']:.4f}"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_sentences_are_learned(write, tmp_path, encoder):
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", str(tmp_path), "--epochs", "4", "--hidden", "16", "--embed", "16"]
    argv += ["--lr", "0.01", "--batch-size", "8", "--dropout", "0.1", "--device", "cpu"]
    assert train_classifier.main([*argv, "--encoder", encoder, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["test_accuracy"] == 1.0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_changes_nothing(encoder):
    args = train_classifier.parse_arguments(["--encoder", encoder, "--hidden", "8", "--embed", "8"])
    embedding = torch.nn.Embedding(5, 8, padding_idx=0)
    examples = train_classifier.Examples([], torch.tensor([]))
    task = train_classifier.Task(examples, examples, examples, 2, embedding, 8, [])
    model = train_classifier.build_model(task, args).eval()
    short, long = torch.tensor([1, 2]), torch.tensor([3, 4, 1, 2, 2, 2, 2])
    padded = torch.nn.utils.rnn.pad_sequence([short, long])
    both = model(padded, torch.tensor([2, 7]))
    alone = model(short[:, None], torch.tensor([2]))
    torch.testing.assert_close(both[:1], alone)


def test_same_seed_gives_the_same_numbers(capsys, tmp_path):
    outputs = []
    for seed in ("0", "0", "1"):
        train_classifier.main([*SMALL, "--encoder", "gru", "--seed", seed, "--out", str(tmp_path)])
        outputs.append(re.sub(r"[\d.]+ s\n", "", capsys.readouterr().out))
    assert outputs[0] == outputs[1] != outputs[2]


def test_early_stopping_keeps_the_best_weights(capsys, monkeypatch, tmp_path):
    accuracies = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(train_classifier.Run, "accuracy", lambda run, examples: next(accuracies))
    argv = [*SMALL, "--encoder", "gru", "--epochs", "9", "--patience", "2", "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["best_epoch"], metrics["best_dev_accuracy"], len(metrics["epochs"])) == (1, 0.5, 3)
    assert metrics["test_accuracy"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "cnn", "--layers", "2"], "--layers is for sru, lstm and gru: leave it out"),
        (["--encoder", "lstm", "--sru-version", "2"], "--sru-version is for sru: leave it out"),
        (["--momentum", "0.5"], "--momentum is for sgd: leave it out"),
        (["--dataset", "mr", "--vectors-name", "glove"], "--vectors-name is for --vectors: leave it out"),
        (["--clip", "0"], "argument --clip: expected 1e-30 to inf, got 0"),
    ],
)
def test_option_without_effect_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        train_classifier.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_digest_tells_data_apart(split):
    task = train_classifier.load_task(train_classifier.parse_arguments([]))
    before = task.digest()
    getattr(task, split).labels[0] += 1
    assert task.digest() != before


def test_infinite_loss_is_one_line(capsys, tmp_path):
    assert train_classifier.main([*SMALL, "--encoder", "gru", "--lr", "inf", "--out", str(tmp_path)]) == 2
    assert "try a smaller --lr" in capsys.readouterr().err


def figures_of(out: Path) -> tuple[dict, bytes]:
    """All that a run found out, apart from how long it took, and its weights."""
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("arguments", "versions"):
        del metrics[name]
    for epoch in metrics["epochs"]:
        del epoch["seconds"], epoch["train_cpu_seconds"]
    return metrics, (out / "weights.safetensors").read_bytes()


RESUMED = ["--hidden", "16", "--embed", "8", "--limit", "400", "--device", "cpu", "--patience", "4", "--lr", "0.003"]


@pytest.fixture
def one_thread():
    """Several threads add in an order of their own: the last bits of two runs then differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork processes")
def test_run_killed_ten_times_gives_the_figures_of_an_undisturbed_one(tmp_path):
    argv = [*RESUMED, "--encoder", "sru", "--epochs", "60", "--patience", "60", "--resume", "--out"]
    assert forking.finish(train_classifier.main, [*argv, str(tmp_path / "undisturbed")]) == 0
    epochs = json.loads((tmp_path / "undisturbed" / "metrics.json").read_text())["epochs"]
    seconds = statistics.median(epoch["seconds"] for epoch in epochs)
    moments, metrics = random.Random(0), tmp_path / "killed" / "metrics.json"

    def written():
        """When metrics.json was written, and of how many epochs."""
        if not metrics.exists():
            return 0, 0
        return metrics.stat().st_mtime_ns, len(json.loads(metrics.read_text())["epochs"])

    for kill in range(10):
        before = written()
        process = forking.start(train_classifier.main, [*argv, str(tmp_path / "killed")])
        # In turns before, in or after its first epoch, and some time after that.
        while written()[kill % 2] <= before[kill % 2]:
            assert process.is_alive(), "the run ended before it was killed ten times"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 4 * seconds))
        process.kill()
        process.join()
    assert 5 <= written()[1] < 60
    assert forking.finish(train_classifier.main, [*argv, str(tmp_path / "killed")]) == 0
    assert figures_of(tmp_path / "killed") == figures_of(tmp_path / "undisturbed")


class Killed(BaseException):
    """Takes the place of SIGKILL: nothing catches it."""


@pytest.mark.parametrize(("writes", "optimizer"), [*((n, "adam") for n in range(15)), (8, "adamw"), (8, "sgd")])
def test_run_that_ends_between_two_files_goes_on(monkeypatch, tmp_path, one_thread, writes, optimizer):
    argv = [*RESUMED, "--encoder", "gru", "--epochs", "3", "--optimizer", optimizer]
    assert train_classifier.main([*argv, "--out", str(tmp_path / "undisturbed")]) == 0
    left = writes

    def write(path: Path, data: str | bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        original(path, data)

    original = train_classifier.write
    with monkeypatch.context() as patched:
        for module in (train_classifier, sys.modules["run_files"]):
            patched.setattr(module, "write", write)
        with pytest.raises(Killed):
            train_classifier.main([*argv, "--out", str(tmp_path / "killed")])
    assert train_classifier.main([*argv, "--resume", "--out", str(tmp_path / "killed")]) == 0
    assert figures_of(tmp_path / "killed") == figures_of(tmp_path / "undisturbed")


def test_sparse_run_resumes_to_the_last_bit(write, tmp_path, one_thread):
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", str(tmp_path), "--sparse", "--encoder", "lstm", *RESUMED]
    assert train_classifier.main([*argv, "--epochs", "4", "--out", str(tmp_path / "whole")]) == 0
    for epochs in ("2", "4"):
        assert train_classifier.main([*argv, "--epochs", epochs, "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert figures_of(tmp_path / "parts") == figures_of(tmp_path / "whole")


def test_finished_run_is_not_trained_again(capsys, monkeypatch, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(train_classifier.Run, "train_epoch", None)
    assert train_classifier.main([*argv, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--hidden", "9"], "hidden 8, not 9"),
        (["--encoder", "lstm", "--seed", "3"], "encoder gru, not lstm, seed 0, not 3"),
        (["--fold", "1"], "fold 0, not 1"),
    ],
)
def test_run_of_another_configuration_is_refused(capsys, tmp_path, changed, message):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0
    before = (tmp_path / "metrics.json").read_bytes()
    capsys.readouterr()
    assert train_classifier.main([*argv, "--resume", *changed]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_run_on_other_data_is_refused(capsys, write, tmp_path):
    argv = ["--dataset", "mr", "--data-dir", str(tmp_path), *SMALL, "--encoder", "gru", "--out", str(tmp_path / "out")]
    write("MR/rt-polarity.all", lines(2, 100))
    assert train_classifier.main(argv) == 0
    write("MR/rt-polarity.all", lines(2, 101))
    assert train_classifier.main([*argv, "--resume"]) == 2
    assert "other data" in capsys.readouterr().err


def test_unfinished_run_is_not_overwritten(capsys, monkeypatch, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(train_classifier.Run, "finish", lambda run: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_classifier.main(argv)
    capsys.readouterr()
    assert train_classifier.main(argv) == 2
    assert "add --resume" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    assert train_classifier.main(argv) == 0


def test_tensorboard_counts_no_epoch_twice(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = [*SMALL, "--encoder", "gru", "--patience", "9", "--tensorboard", "--out", str(tmp_path)]
    assert train_classifier.main([*argv, "--epochs", "2"]) == 0
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    assert train_classifier.main([*argv, "--epochs", "3", "--resume"]) == 0
    (tmp_path / "checkpoint.pt").write_bytes(checkpoint)
    assert train_classifier.main([*argv, "--epochs", "4", "--resume"]) == 0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = board.Scalars("dev_accuracy")
    assert [value.step for value in values] == [1, 2, 3, 4]
    epochs = json.loads((tmp_path / "metrics.json").read_text())["epochs"]
    assert [value.value for value in values] == pytest.approx([epoch["dev_accuracy"] for epoch in epochs])


def test_version_2_has_its_weights(tmp_path):
    argv = [*SMALL, "--encoder", "sru", "--sru-version", "2", "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0
    assert "encoder.rnn.weight_c_l0" in load_file(tmp_path / "weights.safetensors")


VECTORS = {"the": [1.0, 2.0, 3.0], "word0": [-1.0, 0.5, 0.25], "unheard": [9.0, 9.0, 9.0]}


def text_vectors(header: bool) -> bytes:
    rows = [" ".join([word, *map(str, numbers)]) for word, numbers in VECTORS.items()]
    return "\n".join([*(["3 3"] if header else []), *rows, ""]).encode()


def binary_vectors() -> bytes:
    rows = [word.encode() + b" " + np.array(numbers, np.float32).tobytes() for word, numbers in VECTORS.items()]
    return b"3 3\n" + b"".join(rows)


def save_archive(path: Path) -> None:
    vectors = np.array(list(VECTORS.values()), np.float16)
    np.savez(path, words_small=np.array(list(VECTORS)), vecs_small=vectors, words_b=np.array(["a"]), vecs_b=vectors[:1])


# gensim leaves a file without a header open until it is collected.
gensim_leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@gensim_leaves_files_open
@pytest.mark.parametrize("kind", ["glove.txt", "word2vec.txt", "word2vec.bin", "subset.npz"])
def test_pretrained_vectors_are_the_embedding(capsys, write, tmp_path, kind):
    name = []
    if kind == "subset.npz":
        save_archive(tmp_path / kind)
        name = ["--vectors-name", "small"]
    else:
        pytest.importorskip("gensim")
        write(kind, binary_vectors() if kind == "word2vec.bin" else text_vectors(header=kind == "word2vec.txt"))
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", str(tmp_path), "--vectors", str(tmp_path / kind), *name, "--freeze"]
    argv += ["--encoder", "gru", "--hidden", "8", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert train_classifier.main(argv) == 0
    vocabulary = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert f"vectors of size 3 for 2 of {len(vocabulary)} words" in capsys.readouterr().out
    embedding = load_file(tmp_path / "out" / "weights.safetensors")["embedding.weight"]
    for word in ("the", "word0"):
        assert embedding[vocabulary.index(word)].tolist() == VECTORS[word]
    assert embedding[vocabulary.index("word1")].abs().sum() > 0


@gensim_leaves_files_open
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vectors.txt", b"", "has no word vectors"),
        ("vectors.txt", b"the 1.0 2.0 3.0\nword 1.0 2.0\n", "cannot be read as word vectors"),
        ("vectors.txt", "the 1.0 2.0\n".encode("utf-16"), "cannot be read as word vectors"),
        ("vectors.bin", b"3 3\nthe", "cannot be read as word vectors"),
        ("vectors.npz", b"nothing", "cannot be read as word vectors"),
    ],
)
def test_bad_vectors_are_one_line(capsys, write, tmp_path, name, data, message):
    pytest.importorskip("gensim")
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", tmp_path, "--vectors", write(name, data), "--vectors-name", "small"]
    assert message in error_of(capsys, *argv)


def test_missing_vectors_are_one_line(capsys, write, tmp_path):
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", tmp_path, "--vectors", tmp_path / "none.txt"]
    assert "there is no file" in error_of(capsys, *argv)


def test_archive_names_its_vectors(capsys, write, tmp_path):
    write("MR/rt-polarity.all", lines(2, 100))
    save_archive(tmp_path / "subset.npz")
    argv = ["--dataset", "mr", "--data-dir", tmp_path, "--vectors", tmp_path / "subset.npz"]
    assert "has the vectors small, b: choose with --vectors-name" in error_of(capsys, *argv)
    assert "leave --embed 5 out" in error_of(capsys, *argv, "--vectors-name", "small", "--embed", "5")


def test_missing_gensim_names_both_ways_out(capsys, monkeypatch, write, tmp_path):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    write("MR/rt-polarity.all", lines(2, 100))
    argv = ["--dataset", "mr", "--data-dir", tmp_path, "--vectors", write("glove.txt", text_vectors(header=False))]
    message = error_of(capsys, *argv)
    assert "pip install gensim" in message
    assert "leave --vectors out" in message


def test_glove_subset_is_read(real_data):
    rows, vectors = word_vectors.load(real_data / "glove_subset.npz", "6b_300d")
    assert vectors.shape == (len(rows), 300)
    assert {"good", "bad"} <= set(rows)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to a single process")
def test_ctrl_c_leaves_the_best_weights(tmp_path):
    argv = [*SMALL, "--epochs", "100000", "--patience", "100000", "--encoder", "gru", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "train_classifier.py"), *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("epoch  2"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    last = r"interrupted \(--resume goes on\): the best weights, of epoch \d+, are in .*"
    assert re.fullmatch(last, out.splitlines()[-1])
    assert json.loads((tmp_path / "metrics.json").read_text())["test_accuracy"] is None
    assert load_file(tmp_path / "weights.safetensors")
    assert (tmp_path / "curves.png").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", CORPORA)
def test_real_data_has_the_published_size(real_data, name):
    sizes = {"mr": [10662], "cr": [3775], "subj": [10000], "mpqa": [10606], "trec": [5452, 500],
             "sst1": [8544, 1101, 2210], "sst2": [6920, 872, 1821]}  # fmt: skip
    parts = [sentence_data.read(file, CORPORA[name]) for file in sentence_data.find(CORPORA[name], real_data)]
    assert [len(part.labels) for part in parts] == sizes[name]
    assert sum(not sentence for part in parts for sentence in part.sentences) == {"cr": 5, "mpqa": 3}.get(name, 0)


@pytest.mark.parametrize("name", CORPORA)
def test_real_data_trains(real_data, tmp_path, name):
    argv = [*SMALL, "--dataset", name, "--data-dir", str(real_data), "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0


def test_finished_run_is_not_replaced_by_another(capsys, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_classifier.main(argv) == 0
    assert train_classifier.main(argv) == 0  # the same again
    capsys.readouterr()
    assert train_classifier.main([*argv, "--epochs", "9"]) == 2
    assert re.search(r"holds a run with epochs \d+, not 9: change --out, or delete the folder", capsys.readouterr().err)


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_damaged_checkpoint_is_named(capsys, content, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert train_classifier.main([*SMALL, "--resume", "--out", str(tmp_path)]) == 2
    assert "is not a checkpoint of this program" in capsys.readouterr().err


def test_folder_of_another_program_is_refused(capsys, tmp_path):
    (tmp_path / "metrics.json").write_text('{"test_loss": 1.0}')
    assert train_classifier.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "holds files of another program" in capsys.readouterr().err
