"""Pretrained word vectors: text files of GloVe and word2vec, binary files of word2vec, and NumPy archives."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common import InputError


def load(path: Path, name: str | None = None) -> tuple[Mapping[str, int], np.ndarray]:
    """Rows of the words, and the vectors, `(words, size)`, of a file.

    Args:
        path: A NumPy archive if it ends in `.npz`, word2vec's binary format if in `.bin` or `.bin.gz`, otherwise text
            with a word and its numbers in each line, after a line of two counts (word2vec) or without one (GloVe).
        name: Which vectors of a NumPy archive: it has the arrays `words_NAME` and `vecs_NAME`.

    Raises:
        InputError: If the file is missing or is not what its name says.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: give a file of word vectors with --vectors")
    try:
        rows, vectors = load_archive(path, name) if path.suffix == ".npz" else load_gensim(path)
    except (ValueError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as word vectors ({reason}): see --vectors in --help") from None
    if not rows:
        raise InputError(f"{path} has no word vectors: copy it again")
    return rows, vectors


def load_archive(path: Path, name: str | None) -> tuple[dict[str, int], np.ndarray]:
    with np.load(path) as archive:
        names = [key.removeprefix("words_") for key in archive if key.startswith("words_")]
        if name not in names:
            raise InputError(f"{path} has the vectors {', '.join(names) or 'of no name'}: choose with --vectors-name")
        words, vectors = archive[f"words_{name}"], archive[f"vecs_{name}"].astype(np.float32)
    return {str(word): row for row, word in enumerate(words)}, vectors


def load_gensim(path: Path) -> tuple[Mapping[str, int], np.ndarray]:
    try:
        from gensim.models import KeyedVectors
        from smart_open import open as open_any
    except ModuleNotFoundError as missing:
        raise InputError(f"no module {missing.name}: run `pip install gensim`, or leave --vectors out") from None
    binary = path.name.endswith((".bin", ".bin.gz"))
    header = True
    if not binary:
        with open_any(path, "rb") as file:
            first = file.readline().split()
        if not first:
            return {}, np.zeros((0, 0), np.float32)
        header = len(first) == 2
    # Words that are not UTF-8 match none of ours: they are no reason to refuse the others.
    options = {"binary": binary, "no_header": not header, "unicode_errors": "replace"}
    loaded = KeyedVectors.load_word2vec_format(str(path), **options)
    return loaded.key_to_index, loaded.vectors
