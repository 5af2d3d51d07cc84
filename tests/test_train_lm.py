"""The language modelling example runs, small; killed, it goes on to the same figures; an error is one line."""

import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]

import forking  # noqa: E402
import language_model  # noqa: E402
import language_modelling  # noqa: E402
import lm_run  # noqa: E402
import text_data  # noqa: E402
import train_lm  # noqa: E402
from common import InputError  # noqa: E402
from example_runs import check_files, read_error  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ENCODERS = ["sru", "lstm", "gru"]
SMALL = ["--epochs", "1", "--hidden", "8", "--layers", "2", "--limit", "2000", "--device", "cpu"]
TEXT = "the cat sat on the mat\nthe dog sat on the log\n" * 40


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """One thread, which needs no waiting for others; and no picture where a test does not ask for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(train_lm.Run, "draw", lambda run: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def picture():
    """Asks for the picture of the run."""


@pytest.fixture
def data_dir(tmp_path):
    """A folder with small texts under the names of the Penn Treebank's."""
    folder = tmp_path / "data"
    (folder / "PTB").mkdir(parents=True)
    for name in text_data.PTB_FILES:
        text = "".join(f" {line} \n" for line in TEXT.splitlines()).replace("dog", "<unk>")
        (folder / "PTB" / name).write_text(text)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "cats.txt"
    path.write_text(TEXT)
    return path


def figures(out: Path) -> dict:
    """All that a run found out, without how long it took."""
    metrics = json.loads((out / "metrics.json").read_text())
    for record in metrics["epochs"]:
        del record["seconds"], record["cpu_seconds"]
    return {name: metrics[name] for name in ("step", "best_epoch", "best_valid_loss", "test_loss", "epochs", "curve")}


def error_of(capsys, *argv) -> str:
    """The one line that a run with these arguments leaves on stderr, along with exit status 2."""
    return read_error(capsys, train_lm.main, *argv)[1]


def shape(encoder: str, **changes) -> language_model.Shape:
    values = {"encoder": encoder, "hidden": 8, "layers": 2, "dropout": 0.0, "rnn_dropout": 0.0, "sru_version": 2,
              "highway_bias": 0.0}  # fmt: skip
    return language_model.Shape(**values | changes)


@pytest.mark.parametrize("length", [13, 16, 17, 20])
def test_streams_are_the_text_side_by_side(length):
    numbers = torch.arange(length)
    inputs, targets = text_data.streams(numbers, 4)
    steps = (length - 1) // 4
    assert inputs.shape == targets.shape == (steps, 4)
    assert inputs.t().flatten().tolist() == list(range(4 * steps))
    assert torch.equal(targets, inputs + 1)


def test_words_of_a_line_end_with_a_mark():
    assert text_data.symbols("a b\n\nc\n", "word") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]


@pytest.mark.parametrize("level", ["char", "word"])
def test_join_is_the_inverse_of_symbols(level):
    text = "\n\na b\n\nc d e\n"
    assert text_data.join(text_data.symbols(text, level), level) == text


def test_split_loses_nothing():
    parts = text_data.split(TEXT)
    assert "".join(parts) == TEXT
    assert [part.count("\n") for part in parts] == [72, 4, 4]


def test_vocabulary_is_of_the_training_text_by_frequency():
    corpus = text_data.encode(["b a b a b\n", "a z\n", "b b\n"], "word")
    assert corpus.vocabulary == ["<unk>", "b", "a"]
    assert corpus.train.tolist() == [1, 2, 1, 2, 1, 0]
    assert corpus.valid.tolist() == [2, 0, 0]


def test_rare_words_stay_where_the_text_has_unknown_words():
    corpus = text_data.encode(["<unk> b b\n", "b b\n", "b b\n"], "word")
    assert sorted(corpus.vocabulary) == ["<eos>", "<unk>", "b"]


def test_character_that_training_lacks_is_unknown():
    corpus = text_data.encode(["abab", "az", "bb"], "char")
    assert corpus.vocabulary == ["<unk>", "a", "b"]
    assert corpus.valid.tolist() == [1, 0]


def test_penn_treebank_has_the_published_size():
    if "NUMSRU_DATA" not in os.environ:
        pytest.skip("the environment variable NUMSRU_DATA does not name the folder of the data sets")
    corpus = text_data.encode(text_data.read_ptb(Path(os.environ["NUMSRU_DATA"])), "word")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [929_589, 73_760, 82_430]
    assert len(corpus.vocabulary) == 10_000


def test_penn_treebank_slice_trains_on_words(capsys, tmp_path):
    if "NUMSRU_DATA" not in os.environ:
        pytest.skip("the environment variable NUMSRU_DATA does not name the folder of the data sets")
    argv = ["--dataset", "ptb", "--limit", "6000", "--epochs", "5", "--hidden", "32", "--lr", "0.02", "--warmup", "5"]
    assert train_lm.main([*argv, "--bptt", "8", "--device", "cpu", "--out", str(tmp_path)]) == 0
    last = re.fullmatch(r"test perplexity: ([\d.]+)", capsys.readouterr().out.splitlines()[-1])
    corpus = text_data.encode(text_data.read_ptb(Path(os.environ["NUMSRU_DATA"])), "word", 6000)
    counts = 1 + torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    of_frequencies = math.exp(-(counts / counts.sum())[corpus.test].log().mean())
    assert 20 < float(last[1]) < of_frequencies


@pytest.mark.parametrize("encoder", ENCODERS)
def test_run_writes_its_files(capsys, tmp_path, picture, encoder):
    assert train_lm.main([*SMALL, "--encoder", encoder, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    last = re.fullmatch(r"test bits per character: (\d\.\d{3})", printed.out.splitlines()[-1])
    metrics = check_files(tmp_path, encoder, {"epoch", "train_loss", "valid_loss", "seconds", "cpu_seconds"})
    assert last[1] == f"{metrics['test_loss'] / math.log(2):.3f}"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_text_is_learned_word_by_word(text_file, tmp_path, encoder):
    argv = ["--text", str(text_file), "--level", "word", "--encoder", encoder, "--epochs", "12", "--lr", "0.05"]
    argv += ["--hidden", "16", "--layers", "2", "--batch-size", "4", "--bptt", "6", "--warmup", "5"]
    assert train_lm.main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 0
    # The text repeats itself: only its first words, read without what is before them, can surprise.
    assert math.exp(figures(tmp_path)["test_loss"]) < 1.5


@pytest.mark.parametrize("encoder", ENCODERS)
def test_state_is_carried_from_piece_to_piece(encoder):
    model = language_model.LanguageModel(5, shape(encoder))
    symbols = torch.randint(5, (7, 3))
    whole, final = model(symbols)
    first, state = model(symbols[:4])
    second, last = model(symbols[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for part, expected in zip(last, final, strict=True):
        assert part.shape == (2, 3, 8)
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("length", [2, 513, 514, 1030])
def test_mean_loss_is_that_of_the_whole_text(encoder, length):
    model = language_model.LanguageModel(5, shape(encoder, dropout=0.5)).double()
    numbers = torch.randint(5, (length,))
    found = language_model.mean_loss(model, numbers, lambda: torch.autocast("cpu", enabled=False))
    scores = model(numbers[:-1, None])[0]
    assert found == pytest.approx(torch.nn.functional.cross_entropy(scores[:, 0], numbers[1:]).item(), rel=1e-9)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropout_has_one_mask_for_all_steps(encoder):
    model = language_model.LanguageModel(5, shape(encoder, dropout=0.5, rnn_dropout=0.5)).train()
    recorded = []
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM | torch.nn.GRU):
            module.register_forward_pre_hook(lambda module, arguments: recorded.append(arguments[0]))
    model.encoder.register_forward_pre_hook(lambda module, arguments: recorded.append(arguments[0]))
    model(torch.randint(5, (9, 4)))
    for x in recorded:
        dropped = x == 0
        assert torch.equal(dropped, dropped[:1].expand_as(dropped))
        assert 0 < dropped.double().mean() < 1


def test_output_layer_is_the_embedding():
    model = language_model.LanguageModel(5, shape("gru"))
    assert [name for name, parameter in model.named_parameters() if parameter.shape == (5, 8)] == ["embedding.weight"]
    h, _ = model.encoder(model.embedding(torch.tensor([[3]])), None)
    scores, _ = model(torch.tensor([[3]]))
    torch.testing.assert_close(scores[0, 0], model.embedding.weight @ h[0, 0])


@pytest.mark.parametrize(("encoder", "layers"), [("sru", 6), ("lstm", 2), ("gru", 1)])
def test_parameters_decide_the_hidden_size(encoder, layers):
    argv = ["--encoder", encoder, "--layers", str(layers), "--parameters", "100000"]
    args = train_lm.parse_arguments(argv)
    model = train_lm.build_model(500, args)
    wider = language_model.LanguageModel(500, shape(encoder, layers=layers, hidden=args.hidden + 4))
    assert language_model.count_parameters(model) <= 100_000 < language_model.count_parameters(wider)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_rises_before_it_follows_the_schedule(monkeypatch, tmp_path, schedule):
    rates = []
    train_step = train_lm.Run.train_step

    def record(run, steps):
        train_step(run, steps)
        rates.append(run.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(train_lm.Run, "train_step", record)
    argv = [*SMALL, "--encoder", "gru", "--lr", "0.01", "--warmup", "4", "--bptt", "5", "--schedule", schedule]
    assert train_lm.main([*argv, "--out", str(tmp_path)]) == 0
    assert len(rates) == math.ceil((1999 // 32) / 5)
    shares = [(1 + math.cos(math.pi * i / len(rates))) / 2 if schedule == "cosine" else 1 for i in range(len(rates))]
    assert rates == pytest.approx([0.01 * min(1, (i + 1) / 4) * share for i, share in enumerate(shares)])


def test_gradient_is_clipped(monkeypatch, tmp_path):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, bound):
        parameters = list(parameters)
        clip(parameters, bound)
        norms.append(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    assert train_lm.main([*SMALL, "--encoder", "gru", "--clip", "0.001", "--out", str(tmp_path)]) == 0
    assert norms
    assert max(norms) <= 0.00101


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL and no fork server")
@pytest.mark.parametrize(("encoder", "kills"), [("sru", 10), ("lstm", 2)])
def test_killed_run_ends_as_an_undisturbed_one(tmp_path, encoder, kills):
    argv = ["--encoder", encoder, "--epochs", "3", "--hidden", "8", "--layers", "2", "--limit", "20000", "--bptt", "2"]
    argv += ["--rnn-dropout", "0.2", "--checkpoint-every", "7", "--device", "cpu", "--out"]
    assert forking.finish(train_lm.main, [*argv, str(tmp_path / "undisturbed")]) == 0

    moments, out, steps = random.Random(0), tmp_path / "killed", set()
    checkpoint = out / "checkpoint.pt"
    for kill in range(kills):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        process = forking.start(train_lm.main, [*argv, str(out)])
        # Every second time at any moment of the start, else some time after it has got further.
        while kill % 2 and process.is_alive() and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.3))
        assert process.is_alive(), "the run ended before it was killed: make it longer"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if checkpoint.exists():
            steps.add(torch.load(checkpoint, weights_only=True)["step"])
    assert len(steps) >= kills // 2

    assert forking.finish(train_lm.main, [*argv, str(out)]) == 0
    assert figures(out) == figures(tmp_path / "undisturbed")
    for name in ("weights.safetensors", "vocabulary.json"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_finished_run_is_not_trained_again(capsys, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_lm.main(argv) == 0
    first, before = capsys.readouterr().out, figures(tmp_path)
    assert train_lm.main(argv) == 0
    second = capsys.readouterr().out
    assert "epoch  1" in first
    assert "epoch  1" not in second
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert figures(tmp_path) == before


def test_restart_begins_anew(capsys, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_lm.main(argv) == 0
    capsys.readouterr()
    assert train_lm.main([*argv, "--hidden", "4", "--restart"]) == 0
    assert "epoch  1" in capsys.readouterr().out


def test_restart_forgets_the_run_before_it_writes_a_checkpoint(capsys, monkeypatch, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_lm.main(argv) == 0

    def interrupt(run, steps):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_lm.Run, "train_step", interrupt)
        assert train_lm.main([*argv, "--restart"]) == 130
    capsys.readouterr()
    assert train_lm.main(argv) == 0
    assert "epoch  1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hidden", "4"], "holds a run of --hidden 8, not 4"),
        (["--encoder", "lstm"], "holds a run of --encoder gru, not lstm"),
        (["--epochs", "2"], "holds a run of --epochs 1, not 2"),
        (["--rnn-dropout", "0.5"], "holds a run of --rnn-dropout 0.0, not 0.5"),
    ],
)
def test_run_of_other_arguments_is_one_line(capsys, tmp_path, change, message):
    argv = [*SMALL, "--encoder", "gru", "--out", str(tmp_path)]
    assert train_lm.main(argv) == 0
    capsys.readouterr()
    found = error_of(capsys, *argv, *change)
    assert message in found
    assert "--restart" in found


def test_run_of_another_text_is_one_line(capsys, text_file, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--out", tmp_path / "out", "--text", text_file]
    assert train_lm.main([str(argument) for argument in argv]) == 0
    text_file.write_text(TEXT.replace("cat", "tac"))
    assert "holds a run of another text" in error_of(capsys, *argv)


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-40] + text[-40:].swapcase()], ids=["all", "test"])
def test_checksum_tells_texts_apart(change):
    def checksum(text):
        return text_data.encode(text_data.split(text), "word").checksum

    assert checksum(TEXT) == checksum(str(TEXT))
    assert checksum(change(TEXT)) != checksum(TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "lstm", "--sru-version", "1"], "leave --sru-version out: it is for sru"),
        (["--encoder", "gru", "--highway-bias", "0"], "leave --highway-bias out: it is for sru"),
        (["--parameters", "9000", "--hidden", "8"], "leave --hidden out: --parameters decides it"),
        (["--dataset", "ptb", "--text", "x"], "leave --dataset out: --text is one"),
        (["--clip", "0"], "argument --clip: expected 1e-30 to inf, got 0"),
        (["--temperature", "inf"], "argument --temperature: expected 0.001 to 1000, got inf"),
    ],
)
def test_option_without_effect_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        train_lm.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_broken_checkpoint_is_one_line(capsys, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert "is not a checkpoint" in error_of(capsys, *SMALL, "--encoder", "gru", "--out", tmp_path)


def test_checkpoint_that_runs_code_is_refused(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "done"),)

    torch.save({"configuration": Evil()}, tmp_path / "checkpoint.pt")
    assert "UnpicklingError" in error_of(capsys, *SMALL, "--encoder", "gru", "--out", tmp_path)
    assert not (tmp_path / "done").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to kill")
def test_two_processes_that_are_killed_learn_what_one_learns(tmp_path):
    argv = ["--limit", "4000", "--epochs", "3", "--hidden", "16", "--layers", "2", "--dropout", "0", "--bptt", "8"]
    argv += ["--batch-size", "8", "--log-every", "1", "--warmup", "5", "--lr", "0.01", "--checkpoint-every", "20"]
    argv += ["--device", "cpu", "--out"]
    assert train_lm.main([*argv, str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "train_lm.py"), *argv, str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    checkpoint = tmp_path / "two" / "checkpoint.pt"
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as process:
        while not checkpoint.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        # torchrun starts each process in a session of its own, and ends them when it is told to end.
        process.terminate()
        process.communicate(timeout=60)
    assert not (tmp_path / "two" / "curves.png").exists()
    state = torch.load(checkpoint, weights_only=True)["state"]
    assert state is None or state[0].shape == (2, 8, 16)

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after step" in done.stdout
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2
    assert len(one["curve"]) == one["step"] > 50
    assert [step for step, _ in one["curve"]] == [step for step, _ in two["curve"]]
    assert [loss for _, loss in two["curve"]] == pytest.approx([loss for _, loss in one["curve"]], abs=1e-5)
    for name in ("test_loss", "best_valid_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
    assert done.stdout.splitlines()[-1].startswith("test bits per character: ")
    assert done.stdout.count("epoch  3") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("encoder", ["sru", "gru"])
def test_16_bits_learn_nearly_what_32_learn(tmp_path, encoder, precision):
    argv = [*SMALL, "--encoder", encoder, "--lr", "0.02", "--bptt", "8", "--warmup", "1"]
    for name in ("fp32", precision):
        assert train_lm.main([*argv, "--precision", name, "--out", str(tmp_path / name)]) == 0
    wide, narrow = (figures(tmp_path / name)["test_loss"] for name in ("fp32", precision))
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.02)


def test_gradients_are_scaled_in_fp16(monkeypatch, tmp_path):
    scales = []
    save_checkpoint = train_lm.Run.save_checkpoint

    def record(run):
        save_checkpoint(run)
        scales.append(torch.load(run.checkpoint, weights_only=True)["scaler"].get("scale"))

    monkeypatch.setattr(train_lm.Run, "save_checkpoint", record)
    assert train_lm.main([*SMALL, "--encoder", "gru", "--precision", "fp16", "--out", str(tmp_path)]) == 0
    assert scales[-1] > 1


@pytest.fixture
def trained(tmp_path, text_file, capsys):
    """The folder of a trained model."""
    out = tmp_path / "trained"
    argv = ["--text", str(text_file), "--epochs", "2", "--hidden", "8", "--layers", "1", "--batch-size", "4"]
    assert train_lm.main([*argv, "--device", "cpu", "--out", str(out)]) == 0
    capsys.readouterr()
    return out


def generated(capsys, *argv) -> str:
    assert train_lm.main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_generate_goes_on_from_the_prompt(capsys, trained):
    argv = ["--out", trained, "--generate", "30", "--prompt", "the cat"]
    text = generated(capsys, *argv)
    assert text.startswith("the cat")
    assert len(text) == 37
    assert set(text) <= set(TEXT)
    assert generated(capsys, *argv) == text
    assert generated(capsys, *argv, "--seed", "1") != text


def test_temperature_0_takes_the_likeliest(capsys, trained):
    argv = ["--out", trained, "--generate", "30", "--temperature", "0"]
    assert generated(capsys, *argv) == generated(capsys, *argv, "--seed", "1")


def test_generate_writes_words(capsys, data_dir, tmp_path):
    out = tmp_path / "out"
    argv = [*SMALL, "--dataset", "ptb", "--data-dir", str(data_dir), "--encoder", "gru", "--out", str(out)]
    assert train_lm.main(argv) == 0
    capsys.readouterr()
    text = generated(capsys, "--out", out, "--generate", "20", "--prompt", "the cat", "--temperature", "5")
    assert text.startswith("the cat")
    assert len(text_data.symbols(text, "word")) >= 22
    assert set(text.split()) <= set(TEXT.split())


def test_generate_without_a_trained_model_is_one_line(capsys, tmp_path):
    assert "train first" in error_of(capsys, "--generate", "5", "--out", tmp_path)


def test_missing_text_is_one_line(capsys, tmp_path):
    assert "nowhere.txt" in error_of(capsys, "--text", tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("some text\n".encode("utf-16"), "is not utf-8 text: convert it"),
        (b"clich\xe9d\n", "is not utf-8 text: convert it"),
        (b"\0\1\2", "is not utf-8 text: convert it"),
        (b"one line only\n", "text has 0 symbols"),
        (b"a\n" * 12, "too few for 32 streams: lower --batch-size"),
    ],
)
def test_unusable_text_is_one_line(capsys, text_file, data, message):
    text_file.write_bytes(data)
    assert message in error_of(capsys, "--text", text_file, "--encoder", "gru", "--device", "cpu")


def test_missing_folder_is_one_line(capsys, tmp_path):
    assert "there is no folder" in error_of(capsys, "--dataset", "ptb", "--data-dir", tmp_path / "nowhere")


def test_missing_ptb_file_is_one_line(capsys, tmp_path):
    assert "ptb.train.txt" in error_of(capsys, "--dataset", "ptb", "--data-dir", tmp_path)


def test_ptb_without_a_folder_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("NUMSRU_DATA", raising=False)
    assert "--data-dir or NUMSRU_DATA" in error_of(capsys, "--dataset", "ptb")


@pytest.mark.parametrize("device", ["toaster", "meta"])
def test_unusable_device_is_one_line(capsys, device):
    assert "try --device cpu" in error_of(capsys, "--device", device, "--encoder", "gru")


def test_too_few_parameters_is_one_line(capsys, tmp_path):
    assert "the smallest model has" in error_of(capsys, "--device", "cpu", "--parameters", "10", "--out", tmp_path)


def test_lstm_that_a_cpu_cannot_compute_in_16_bits_is_one_line(capsys, monkeypatch, tmp_path):
    def fail(run, steps):
        raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive.")

    monkeypatch.setattr(train_lm.Run, "train_step", fail)
    assert "try --precision fp32" in error_of(capsys, *SMALL, "--precision", "fp16", "--out", tmp_path)


def test_infinite_loss_is_one_line(capsys, tmp_path):
    argv = [*SMALL, "--encoder", "gru", "--lr", "inf", "--out", tmp_path]
    assert "try a smaller --lr" in error_of(capsys, *argv)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_out_that_is_a_file_is_one_line(capsys, text_file):
    assert "cats.txt" in error_of(capsys, *SMALL, "--encoder", "gru", "--out", text_file)


def test_missing_package_is_one_line():
    blocked = "import sys; sys.modules['tqdm'] = None; import train_lm"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=EXAMPLES)
    assert done.returncode == 2
    todo = "run `pip install -e '.[examples]'` in the folder above examples"
    assert done.stderr == f"error: no module tqdm: {todo}\n"


def test_missing_tensorboard_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = error_of(capsys, *SMALL, "--encoder", "gru", "--tensorboard", "--out", tmp_path)
    assert "pip install tensorboard" in message


def test_tensorboard_gets_the_losses(monkeypatch, tmp_path):
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append((step, value))

        def flush(self):
            pass

    monkeypatch.setattr(lm_run, "open_tensorboard", lambda folder, step: Writer())
    argv = [*SMALL, "--encoder", "gru", "--bptt", "2", "--tensorboard", "--out", str(tmp_path)]
    assert train_lm.main(argv) == 0
    metrics = figures(tmp_path)
    assert written["train_loss"] == [tuple(point) for point in metrics["curve"]]
    assert written["valid_loss"] == [(metrics["step"], metrics["best_valid_loss"])]
    assert written["test_loss"] == [(metrics["step"], metrics["test_loss"])]
    assert len(written["learning_rate"]) == len(metrics["curve"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to a single process")
def test_ctrl_c_tells_what_is_kept(tmp_path):
    argv = [*SMALL, "--epochs", "100000", "--encoder", "gru", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith("epoch  2"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert re.fullmatch(
        r"interrupted: the best weights, of epoch \d+, are in .*; the same command goes on from the last checkpoint",
        out.splitlines()[-1],
    )
    assert load_file(tmp_path / "weights.safetensors")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ctrl_c_in_a_step_keeps_the_step(capsys, monkeypatch, tmp_path):
    train_step = train_lm.Run.train_step

    def interrupt(run, steps):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(run, steps)

    argv = [*SMALL, "--bptt", "4", "--encoder", "gru", "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        patch.setattr(train_lm.Run, "train_step", interrupt)
        assert train_lm.main(argv) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted: the same command goes on from the last checkpoint"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train_lm.main(argv) == 0
    assert "goes on after step 3 of" in capsys.readouterr().out
    assert train_lm.main([*argv[:-1], str(tmp_path / "undisturbed")]) == 0
    assert figures(tmp_path / "stopped") == figures(tmp_path / "undisturbed")


def test_interruption_before_the_first_checkpoint_is_one_line(capsys, monkeypatch, tmp_path):
    def interrupt(run, steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_lm.Run, "train_step", interrupt)
    assert train_lm.main([*SMALL, "--encoder", "gru", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted: nothing is kept yet"


@pytest.mark.parametrize("file", ["metrics.json", "vocabulary.json", "weights.safetensors"])
def test_damaged_run_cannot_write_text(capsys, file, tmp_path):
    assert train_lm.main([*SMALL, "--epochs", "1", "--encoder", "gru", "--out", str(tmp_path)]) == 0
    (tmp_path / file).write_text("{}")
    assert train_lm.main(["--generate", "5", "--out", str(tmp_path)]) == 2
    assert "holds no run of this program, or a damaged one" in capsys.readouterr().err


COMMANDS = [
    line.strip()
    for page in (EXAMPLES / "README.md", EXAMPLES / "train_lm.py")
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match(r" *(python|torchrun) .*(train_lm|language_modelling)\.py", line)
]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_documented_command_runs(monkeypatch, capsys, tmp_path, data_dir, text_file, command):
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(command.replace("DATA", str(data_dir)).replace("FILE", str(text_file)))
    if program == "torchrun":
        # The test of two processes starts some; here the arguments are what matters.
        argv = argv[next(i for i, argument in enumerate(argv) if argument.endswith(".py")) :]
    script, *argv = argv
    assert (ROOT / script).is_file()
    if script.endswith("language_modelling.py"):
        monkeypatch.setattr(language_modelling, "LEARNING_RATES", (0.01,))
        argv += ["--epochs", "1", "--parameters", "4000", "--out", str(tmp_path / "results")]
        assert language_modelling.main(argv) == 0
        return
    small = ["--epochs", "1", "--limit", "1000", "--layers", "1", "--device", "cpu", "--warmup", "1"]
    small += ["--parameters", "4000"] if "--parameters" in argv else ["--hidden", "8"]
    if "--generate" in argv:
        # The command before it on the page has trained the model.
        out = argv[argv.index("--out") :] if "--out" in argv else []
        assert train_lm.main([*small, *out]) == 0
        capsys.readouterr()
    assert train_lm.main([*argv, *small]) == 0
    assert capsys.readouterr().out


def test_commands_are_documented():
    assert len(COMMANDS) > 5


def test_experiment_goes_on_where_it_was(capsys, monkeypatch, tmp_path, data_dir):
    argv = ["--data-dir", str(data_dir), "--epochs", "2", "--parameters", "4000"]
    argv += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    trained = []
    train = train_lm.train

    def interrupted(arguments):
        trained.append(arguments)
        return 130 if len(trained) == 3 else train(arguments)

    monkeypatch.setattr(language_modelling, "LEARNING_RATES", (0.01, 0.02, math.inf))
    monkeypatch.setattr(train_lm, "train", interrupted)
    assert language_modelling.main(argv) == 130
    assert "interrupted" in capsys.readouterr().out
    assert language_modelling.main(argv) == 0
    assert "sru-inf: the loss became nan before step 1: try a smaller --lr" in capsys.readouterr().err
    assert len(trained) == 7
    assert trained[2].out == trained[3].out
    assert language_modelling.main(argv) == 0
    assert len(trained) == 9  # those that diverged alone
    assert language_modelling.main([*argv, "--epochs", "1"]) == 2
    assert "holds a run of --epochs 2, not 1: change --runs" in capsys.readouterr().err
    measured = json.loads((tmp_path / "results" / "language_modelling.json").read_text())
    page = (tmp_path / "results" / "language_modelling.md").read_text()
    for encoder, run in measured["runs"].items():
        assert run["parameters"] <= 4000
        assert len(run["epochs"]) == 2
        assert f"| {encoder.upper()} | {run['arguments']['layers']} | {run['arguments']['hidden']} |" in page
        rates = measured["valid_and_test_perplexity_of_learning_rates"][encoder]
        assert rates.pop("Infinity") is None
        assert str(run["arguments"]["lr"]) == min(rates, key=lambda rate: rates[rate][0])
    better = measured["runs"]["sru"]["test_loss"] < measured["runs"]["lstm"]["test_loss"]
    assert f"It {'holds' if measured['holds'] else 'does not hold'}**" in page
    assert better or not measured["holds"]
    assert (tmp_path / "results" / "language_modelling.png").read_bytes().startswith(b"\x89PNG")


def test_experiment_without_data_is_one_line(capsys, tmp_path):
    argv = ["--data-dir", str(tmp_path / "nowhere"), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert language_modelling.main(argv) == 2
    assert "error: there is no folder" in capsys.readouterr().err


def test_bad_text_raises_input_error(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(InputError, match="iconv"):
        text_data.read(tmp_path / "x")
