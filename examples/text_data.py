"""Text for language models: reading, words or characters, vocabulary, parallel streams."""

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from common import InputError
from torch import Tensor

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
PTB_FILES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")


@dataclass
class Corpus:
    """Three texts as numbers of symbols, and the symbols.

    Args:
        train, valid, test: `(number of symbols,)` int64.
        vocabulary: Symbol of each number.
        level: "word" or "char".
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]
    level: str

    @property
    def checksum(self) -> int:
        """Tells one corpus from another."""
        crc = zlib.crc32("\0".join(self.vocabulary).encode())
        for part in (self.train, self.valid, self.test):
            crc = zlib.crc32(part.numpy(), crc)
        return crc


def read(path: Path) -> str:
    """Text of a UTF-8 file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    # A zero byte gives UTF-16, UTF-32 and binary files away.
    if "\0" in text:
        raise InputError(f"{path} is not utf-8 text: convert it, for example with `iconv -t utf-8`")
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text.replace("\r\n", "\n")


def read_ptb(data_dir: Path | None) -> list[str]:
    """Train, valid and test text of the Penn Treebank, in a folder of its own or in `data_dir` itself."""
    if data_dir is None:
        raise InputError(f"ptb needs data: give a folder that has PTB/{PTB_FILES[0]} with --data-dir or NUMSRU_DATA")
    if not data_dir.is_dir():
        raise InputError(f"there is no folder {data_dir}: give the folder of the data with --data-dir")
    for folder in (data_dir / "PTB", data_dir):
        files = [folder / name for name in PTB_FILES]
        if all(file.is_file() for file in files):
            # Each line has a space at both ends, which the usual vocabulary of characters does not count.
            return ["".join(f"{line.strip()}\n" for line in read(file).rstrip("\n").split("\n")) for file in files]
    wanted = data_dir / "PTB" / PTB_FILES[0]
    raise InputError(f"there is no file {wanted}: put {', '.join(PTB_FILES)} there, or change --data-dir")


def read_python_help() -> list[str]:
    """The help texts that Python's `help()` shows, split."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise InputError("this Python has no help texts: give a text with --text FILE") from None
    return split("\n".join(topics[name] for name in sorted(topics)))


def split(text: str) -> list[str]:
    """The first 90 %, the next 5 % and the last 5 % of the lines."""
    lines = text.removesuffix("\n").split("\n")
    first, second = len(lines) * 90 // 100, len(lines) * 95 // 100
    return ["".join(f"{line}\n" for line in part) for part in (lines[:first], lines[first:second], lines[second:])]


def encode(texts: list[str], level: str, limit: int | None = None) -> Corpus:
    """Number the symbols of train, valid and test text, of each at most `limit`.

    The vocabulary is that of the training text, most frequent first. If no unknown word stands in it already, words
    that it has once are unknown, so that the model learns when to expect one.
    """
    train, valid, test = (symbols(text, level)[:limit] for text in texts)
    counts = Counter(train)
    if level == "word" and UNKNOWN not in counts:
        counts = Counter({word: count for word, count in counts.items() if count > 1})
    known = [symbol for symbol, _ in counts.most_common()]
    vocabulary = known if UNKNOWN in counts else [UNKNOWN, *known]
    numbers = {symbol: number for number, symbol in enumerate(vocabulary)}
    unknown = numbers[UNKNOWN]
    parts = [torch.tensor([numbers.get(symbol, unknown) for symbol in part]) for part in (train, valid, test)]
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if len(part) < 2:
            raise InputError(
                f"the {name} text has {len(part)} symbols, expected at least 2: give a text of more lines, "
                "which are shared out between training, validation and test"
            )
    return Corpus(*parts, vocabulary, level)


def symbols(text: str, level: str) -> list[str]:
    """Characters; or words, with a mark at the end of each line."""
    if level == "char":
        return list(text)
    return [word for line in text.rstrip("\n").split("\n") for word in (*line.split(), END_OF_LINE)]


def join(symbols: list[str], level: str) -> str:
    """Text of symbols: the inverse of `symbols`, but for the number of spaces between words."""
    if level == "char":
        return "".join(symbols)
    return " ".join(symbols).replace(f" {END_OF_LINE}", "\n").replace(f"{END_OF_LINE}", "\n").replace("\n ", "\n")


def streams(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut a text into `count` streams that are read side by side.

    Returns:
        Inputs and targets, both `(steps, count)`: a target is the symbol after its input, and a stream goes on where
        the one before ends. Fewer than `count` symbols at the end of the text are left out.
    """
    steps = (len(numbers) - 1) // count
    if steps < 1:
        raise InputError(f"{len(numbers)} symbols are too few for {count} streams: lower --batch-size")
    inputs, targets = (numbers[start : start + steps * count].view(count, steps).t() for start in (0, 1))
    return inputs, targets
