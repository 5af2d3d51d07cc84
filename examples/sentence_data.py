"""Sentence classification data: reading, tokens, folds, vocabulary, batches.

Seven sets of the SRU paper and its predecessors, one sentence per line after its label: `1 a gorgeous , witty film`.
They are read from a folder, or fetched from the Hugging Face hub.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import InputError
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FOLDS = 10
PADDING, UNKNOWN = 0, 1

# The folds belong to the data, so that every encoder and every training seed is measured on the same sentences.
FOLD_SEED = 0


class Split(NamedTuple):
    """Sentences as lists of tokens, and one label, 0 to classes - 1, for each."""

    sentences: list[list[str]]
    labels: list[int]

    def take(self, indices: Iterable[int]) -> "Split":
        chosen = list(indices)
        return Split([self.sentences[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True)
class Corpus:
    """Where a data set lies and what to expect there.

    Args:
        folder: Folder inside the data folder. The files may also lie in the data folder itself.
        files: One file is cross-validated; two are train and test; three are train, dev and test.
        classes: Number of labels.
        hub: Name on the Hugging Face hub.
        encodings: Encodings that the file may have, tried in this order.
    """

    folder: str
    files: tuple[str, ...]
    classes: int
    hub: str
    encodings: tuple[str, ...] = ("utf-8-sig", "latin-1")

    @property
    def cross_validated(self) -> bool:
        return len(self.files) == 1


CORPORA = {
    "mr": Corpus("MR", ("rt-polarity.all",), 2, "cornell-movie-review-data/rotten_tomatoes"),
    "cr": Corpus("CR", ("custrev.all",), 2, "SetFit/CR"),
    "subj": Corpus("Subj", ("subj.all",), 2, "SetFit/subj"),
    "mpqa": Corpus("MPQA", ("mpqa.all",), 2, "rahulsikder223/SentEval-MPQA"),
    "trec": Corpus("TREC", ("TREC.train.all", "TREC.test.all"), 6, "SetFit/TREC-QC"),
    "sst1": Corpus("SST", ("stsa.fine.train", "stsa.fine.dev", "stsa.fine.test"), 5, "SetFit/sst5", ("utf-8-sig",)),
    "sst2": Corpus(
        "SST", ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"), 2, "SetFit/sst2", ("utf-8-sig",)
    ),
}

BRACKETS = {"-lrb-": "(", "-rrb-": ")"}
TOKEN = re.compile(
    r"""n't                                # don't -> do n't
      | '(?:s|m|d|ll|re|ve)\b              # it's  -> it 's
      | [^\W_]+?(?=n't\b)                  # the do of don't
      | [^\W_]+                            # words and numbers; a hyphen or an underscore separates
      | [!?,()]                            # the punctuation that carries a tone""",
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Lower-case words, clitics (`it 's`, `do n't`) and marks of `text`; a lone full stop or quote is dropped."""
    text = text.lower()
    for escaped, bracket in BRACKETS.items():
        text = text.replace(escaped, bracket)
    return TOKEN.findall(text)


def load(name: str, data_dir: Path | None, fold: int = 0) -> tuple[Split, Split, Split]:
    """Train, dev and test split of the data set `name`, from `data_dir` or, if that is None, from the hub."""
    corpus = CORPORA[name]
    parts = fetch(name) if data_dir is None else [read(file, corpus) for file in find(corpus, data_dir)]
    if len(parts) == 1:
        train, dev, test = (parts[0].take(indices) for indices in fold_indices(parts[0].labels, corpus.classes, fold))
        return train, dev, test
    if len(parts) == 2:
        train, dev = (parts[0].take(indices) for indices in dev_indices(np.array(parts[0].labels), corpus.classes))
        return train, dev, parts[1]
    train, dev, test = parts
    return train, dev, test


def find(corpus: Corpus, data_dir: Path) -> list[Path]:
    """The files of a data set, in a folder of their own or in `data_dir` itself."""
    if not data_dir.is_dir():
        raise InputError(f"there is no folder {data_dir}: give the folder of the data sets with --data-dir")
    for folder in (data_dir / corpus.folder, data_dir):
        files = [folder / name for name in corpus.files]
        if all(file.is_file() for file in files):
            return files
    wanted = data_dir / corpus.folder / corpus.files[0]
    raise InputError(f"there is no file {wanted}: put {', '.join(corpus.files)} there, or change --data-dir")


def read(path: Path, corpus: Corpus) -> Split:
    """Read the `LABEL TEXT` lines of one file."""
    sentences, labels = [], []
    # Not splitlines(): it would also split at U+0085, which stands inside sentences of MR and Subj.
    for number, line in enumerate(decode(path, corpus.encodings).split("\n"), start=1):
        label, _, text = line.strip().partition(" ")
        if not label:
            continue
        if not (label.isdecimal() and int(label) < corpus.classes):
            expected = f"expected 0 to {corpus.classes - 1}, a space and a sentence: correct the line"
            raise InputError(f"{path}, line {number}: the label is {label!r}, {expected}")
        sentences.append(tokenize(text))
        labels.append(int(label))
    if not sentences:
        raise InputError(f"{path} is empty: copy the data set again")
    return Split(sentences, labels)


def decode(path: Path, encodings: Sequence[str]) -> str:
    """Text of a file in the first of the encodings that fits."""
    data = path.read_bytes()
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        # latin-1 decodes anything; a zero byte gives UTF-16, UTF-32 and binary files away.
        if "\0" not in text:
            return text
    expected = " or ".join(encoding.removesuffix("-sig") for encoding in encodings)
    raise InputError(f"{path} is not {expected} text: convert it, for example with `iconv -t utf-8`")


def fetch(name: str) -> list[Split]:
    """Fetch the parts of a data set, as many as it has files, from the Hugging Face hub."""
    corpus = CORPORA[name]
    way_out = f"give a folder that has {corpus.folder}/{corpus.files[0]} with --data-dir or NUMSRU_DATA"
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise InputError(f"{name} needs data: {way_out}, or `pip install datasets` to fetch it") from None
    try:
        hub = load_dataset(corpus.hub)
    except Exception as error:  # its own errors, those of requests, httpx and the file system: there is no common class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"could not fetch {corpus.hub} ({reason}): connect to the network, or {way_out}") from None
    parts = [parse(hub[key]) for key in ("train", "validation", "test") if key in hub]
    if corpus.cross_validated:
        return [Split([s for part in parts for s in part.sentences], [n for part in parts for n in part.labels])]
    if len(parts) != len(corpus.files):
        raise InputError(f"{corpus.hub} has {len(parts)} splits, expected {len(corpus.files)}: {way_out}")
    return parts


def parse(part: Any) -> Split:
    """Sentences and labels of one split of the `datasets` library. The hub's sets differ in the names of columns."""
    text, label = (
        next(name for name in names if name in part.column_names)
        for names in (("text", "sentence"), ("label_coarse", "label"))
    )
    return Split([tokenize(line) for line in part[text]], [int(n) for n in part[label]])


def fold_indices(labels: Sequence[int], classes: int, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train (81 %), dev (9 %) and test (10 %) of a fold; the classes keep their shares in each."""
    target = np.asarray(labels)
    check_counts(target, classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=FOLD_SEED)
    rest, test = list(folds.split(target, target))[fold]
    train, dev = dev_indices(target[rest], classes)
    return rest[train], rest[dev], test


def dev_indices(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train (90 %) and dev (10 %); the classes keep their shares in both."""
    check_counts(labels, classes, at_least=FOLDS - 1)
    train, dev = train_test_split(np.arange(len(labels)), test_size=0.1, stratify=labels, random_state=FOLD_SEED)
    return train, dev


def check_counts(labels: np.ndarray, classes: int, at_least: int = FOLDS) -> None:
    counts = np.bincount(labels, minlength=classes)
    rarest = counts.argmin()
    if counts[rarest] < at_least:
        raise InputError(f"class {rarest} has {counts[rarest]} examples, expected at least {at_least}: check the data")


def build_vocabulary(sentences: Iterable[list[str]]) -> dict[str, int]:
    """Number the words, most frequent first, after padding and the unknown word."""
    counts = Counter(word for sentence in sentences for word in sentence)
    return {word: index for index, word in enumerate(["<pad>", "<unk>", *(word for word, _ in counts.most_common())])}


def encode(sentence: list[str], vocabulary: dict[str, int]) -> list[int]:
    """Numbers of the words; a sentence without words is one unknown word."""
    return [vocabulary.get(word, UNKNOWN) for word in sentence] or [UNKNOWN]


@dataclass
class Examples:
    """Sequences, `(L,)` word numbers or `(L, features)` values, and one label for each."""

    sequences: list[Tensor]
    labels: Tensor

    def first(self, count: int | None) -> "Examples":
        return Examples(self.sequences[:count], self.labels[:count])

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Indices of batches of sequences about equally long; the generator, if any, shuffles them."""
        lengths = torch.tensor([len(sequence) for sequence in self.sequences])
        if generator is None:
            return list(lengths.argsort(stable=True).split(size))
        # Sorting within pools of 50 batches leaves hardly any padding, and new batches in every epoch.
        pools = torch.randperm(len(lengths), generator=generator).split(50 * size)
        batches = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Padded sequences `(L, B)` or `(L, B, features)`, lengths `(B,)` and labels `(B,)`."""
        sequences = [self.sequences[i] for i in indices.tolist()]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return pad_sequence(sequences).to(device), lengths.to(device), self.labels[indices].to(device)
