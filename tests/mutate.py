"""Change one operator, comparison or number of a module at a time, and see whether its tests notice.

  python tests/mutate.py numsru/reference.py tests/test_reference.py tests/test_export.py
  python tests/mutate.py --jobs 2 --lines 20-90 numsru/products.py tests/test_products.py
  NUMBA_ENABLE_CUDASIM=1 python tests/mutate.py --every 4 numsru/cuda_kernels.py tests/test_cuda_kernels.py

Prints every mutant that no test notices, and how many there were. `x += y` stays as it is, and so does the second
operator of `x < y < z`. Works on copies; nothing here is changed.
"""

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTEAD = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one thing changed, in every way."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in INSTEAD:
        changed = copy.deepcopy(node)
        changed.op = INSTEAD[type(node.op)]()
        yield changed
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in INSTEAD:
        changed = copy.deepcopy(node)
        changed.ops[0] = INSTEAD[type(node.ops[0])]()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        yield ast.Constant(not node.value if type(node.value) is bool else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


class _Replace(ast.NodeTransformer):
    """The n-th change, from 0, of all that can be made, and no other."""

    def __init__(self, n: int, lines: tuple[int, int]) -> None:
        self.n, self.lines, self.seen, self.what = n, lines, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        line = getattr(node, "lineno", None)
        if line is None or self.lines[0] <= line <= self.lines[1]:
            for changed in changes(node):
                self.seen += 1
                if self.seen == self.n + 1:
                    self.what = f"line {line}: {ast.unparse(node)}  ->  {ast.unparse(changed)}"
                    return ast.copy_location(changed, node)
        return self.generic_visit(node)


def mutate(source: str, n: int, lines: tuple[int, int]) -> tuple[str, str] | None:
    """The n-th mutant of a source and what is different in it; None if there are fewer."""
    replace = _Replace(n, lines)
    tree = replace.visit(ast.parse(source))
    return (ast.unparse(ast.fix_missing_locations(tree)), replace.what) if replace.what else None


def start(module: Path, source: str, tests: list[str], folder: Path) -> int:
    """Begin to test a copy of the project, in a folder, with another source of a module. Returns the process."""
    for name in ("numsru", "tests", "benchmarks", "setup.cfg", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / module).write_text(source, encoding="utf-8")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        # Hypothesis works without its plugin, which takes longer to import than most mutants to be noticed.
        os._exit(pytest.main(["-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *tests]))
    return pid


def survivors(
    module: Path, mutants: list[tuple[str, str]], tests: list[str], jobs: int, timeout: float
) -> Iterator[tuple[str, str]]:
    """The mutants whose tests pass, `jobs` tested at a time. One whose tests take more than `timeout` seconds fails."""
    waiting, running = list(reversed(mutants)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = tempfile.TemporaryDirectory()
                mutant = waiting.pop()
                running[start(module, mutant[0], tests, Path(folder.name))] = mutant, folder, time.monotonic() + timeout
            for pid, (mutant, folder, end) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and time.monotonic() < end:
                    continue
                if not done:
                    print(f"{module}: takes too long: {mutant[1]}", flush=True)
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                folder.cleanup()
                if done and status == 0:
                    yield mutant
            time.sleep(0.02)
    finally:  # processes of their own, which Ctrl-C does not reach
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def main() -> int:
    # Once for all mutants. Not at the top of the file: it has a test, and not every machine can import numba.cuda.
    import numba.cuda  # noqa: F401
    import torch  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lines", default="1-1000000", help="first-last; all by default")
    parser.add_argument("--every", type=int, default=1, help="every N-th mutant; 1, all, by default")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds after which a mutant is printed and counts as noticed"
    )
    args = parser.parse_args()
    source = (ROOT / args.module).read_text(encoding="utf-8")
    first, last = map(int, args.lines.split("-"))
    mutants = []
    while mutant := mutate(source, len(mutants), (first, last)):
        mutants.append(mutant)
    mutants = mutants[:: args.every]

    if not list(survivors(args.module, [(source, "nothing")], args.tests, 1, args.timeout)):
        print("error: the tests fail without any change", file=sys.stderr)
        return 2
    count = 0
    for _, what in survivors(args.module, mutants, args.tests, args.jobs, args.timeout):
        count += 1
        print(f"{args.module}: nobody noticed {what}", flush=True)
    print(f"{args.module}: {len(mutants)} mutants, {len(mutants) - count} noticed")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
