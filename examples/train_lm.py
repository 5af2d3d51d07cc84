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
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Threads that wait for others spin by default; where another program wants the cores, that makes training ten times
# slower and more. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import processes
    import text_data
    import torch
    from common import InputError, above_zero, fill_in, positive, tells_what_to_do, within
    from language_model import LanguageModel, count_parameters, sample
    from lm_run import FREE, PRECISIONS, Run, build_model, figure_of, name_of_figure
    from safetensors import torch as safetensors
    from text_data import Corpus
except ModuleNotFoundError as missing:
    print(
        f"error: no module {missing.name}: run `pip install -e '.[examples]'` in the folder above examples",
        file=sys.stderr,
    )
    sys.exit(2)


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
    free = {name: getattr(args, name) for name in FREE | {"seed"}}
    try:
        trained = json.loads(files[0].read_text(encoding="utf-8"))["arguments"]
        vocabulary = json.loads(files[1].read_text(encoding="utf-8"))
        args = argparse.Namespace(**trained | free)
        model = build_model(len(vocabulary), args)
        model.load_state_dict(safetensors.load(files[2].read_bytes()))
    except Exception as error:  # of JSON, of keys, of safetensors: there is no common class
        reason = f"{args.out} holds no run of this program, or a damaged one ({type(error).__name__})"
        raise InputError(f"{reason}: choose another --out") from None
    with processes.join(args.device) as all_processes:
        model.to(all_processes.device)
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
            with run.stopped_by_ctrl_c():
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

    def temperature(text: str) -> float:
        # Below, the scores divided by it would overflow; 0 takes the likeliest.
        return 0.0 if float(text) == 0 else within(float, 0.001, 1000)(text)

    add = parser.add_argument_group("data").add_argument
    text = "python: help texts that come with Python; ptb: the Penn Treebank [python]"
    add("--dataset", choices=["python", "ptb"], help=text)
    add("--text", type=Path, metavar="FILE", help="any text in UTF-8; its last tenth is for validation and test")
    text = "folder with PTB/ptb.train.txt and so on [environment variable NUMSRU_DATA]"
    add("--data-dir", default=os.environ.get("NUMSRU_DATA"), type=Path, metavar="DIR", help=text)
    add("--level", choices=["word", "char"], help="what is predicted, words or characters [ptb: word; others: char]")
    add("--limit", type=positive, metavar="N", help="use the first N symbols of each text only, for a quick look [all]")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=["sru", "lstm", "gru"], default="sru", help="what reads the text [%(default)s]")
    add("--layers", type=positive, default=3, metavar="N", help="layers of the encoder [%(default)s]")
    add("--hidden", type=positive, metavar="N", help="units of a layer and of the embedding [192]")
    text = "choose --hidden for this size of the model: the largest multiple of 4 with at most N parameters. The same "
    add("--parameters", type=positive, metavar="N", help=f"{text}N for two encoders makes them comparable")
    text = "dropout probability after the embedding, between layers and before the output [%(default)s]"
    add("--dropout", type=probability, default=0.1, metavar="P", help=text)
    text = "dropout probability of the input of each layer's matrix products [%(default)s]"
    add("--rnn-dropout", type=probability, default=0.0, metavar="P", help=text)
    add("--sru-version", type=int, choices=[1, 2], help="2: the SRU's gates see its state [2]")
    text = "first bias of the SRU's reset gate: the lower, the more passes a layer unchanged [-3]"
    add("--highway-bias", type=float, metavar="X", help=text)

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
    add("--clip", type=above_zero, default=1.0, help="largest norm of the gradient [%(default)s]")
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
    text = "0, or 0.001 to 1000; below 1: likelier and more alike; above 1: wilder [%(default)s]"
    add("--temperature", type=temperature, default=0.7, metavar="X", help=text)
    args = parser.parse_args(argv)
    fill_in(parser, args, {
        "dataset": ("python", args.text is None, "leave --dataset out: --text is one"),
        "hidden": (192, args.parameters is None, "leave --hidden out: --parameters decides it"),
        "sru_version": (2, args.encoder == "sru", "leave --sru-version out: it is for sru"),
        "highway_bias": (-3.0, args.encoder == "sru", "leave --highway-bias out: it is for sru"),
    })  # fmt: skip
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
        if not tells_what_to_do(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
