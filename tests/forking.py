"""Processes of the examples that start in milliseconds, so that a test can afford to kill many of them."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
# The last is imported by optimizers when they are made, and takes longer than all that a process does besides.
MODULES = ["forking", "numsru", "train_classifier", "classification", "train_lm", "torch._dynamo"]


def start(main: Callable[[list[str]], int], argv: list[str]) -> BaseProcess:
    """Run `main(argv)` on one thread in a process forked from one that has imported all modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    # What the process that forks is started with, by the first call.
    folders = [str(TESTS), str(EXAMPLES), str(EXAMPLES / "experiments"), *sys.path]
    earlier = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(folders))
    try:
        process = context.Process(target=leave, args=(main, argv))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(earlier)
    return process


def leave(main: Callable[[list[str]], int], argv: list[str]) -> None:
    sys.exit(main(argv))


def finish(main: Callable[[list[str]], int], argv: list[str]) -> int | None:
    """The exit status of `main(argv)` in a process of its own."""
    process = start(main, argv)
    process.join()
    return process.exitcode
