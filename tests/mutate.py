"""Change one operator, comparison or number of a module at a time, and see whether its tests notice.

  python tests/mutate.py numsru/recurrence.py tests/test_recurrence.py tests/test_reference.py
  python tests/mutate.py --jobs 2 --lines 20-90 numsru/products.py tests/test_products.py

Prints every mutant that no test notices, and how many there were. Works on a copy; nothing here is changed.
"""

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    """The n-th change of all that can be made."""

    def __init__(self, n: int, lines: tuple[int, int]) -> None:
        self.n, self.lines, self.seen, self.what = n, lines, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        line = getattr(node, "lineno", None)
        if line is None or self.lines[0] <= line <= self.lines[1]:
            for changed in changes(node):
                if self.seen == self.n:
                    self.what = f"line {line}: {ast.unparse(node)}  ->  {ast.unparse(changed)}"
                self.seen += 1
                if self.what:
                    return ast.copy_location(changed, node)
        return self.generic_visit(node)


def mutate(source: str, n: int, lines: tuple[int, int]) -> tuple[str, str] | None:
    """The n-th mutant of a source and what is different in it; None if there are fewer."""
    replace = _Replace(n, lines)
    tree = replace.visit(ast.parse(source))
    return (ast.unparse(ast.fix_missing_locations(tree)), replace.what) if replace.what else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lines", default="1-1000000", help="first-last; all by default")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a mutant counts as noticed")
    args = parser.parse_args()
    source = (ROOT / args.module).read_text(encoding="utf-8")
    first, last = map(int, args.lines.split("-"))
    mutants = []
    while mutant := mutate(source, len(mutants), (first, last)):
        mutants.append(mutant)

    def survives(mutant: tuple[str, str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("numsru", "tests", "setup.cfg", "pyproject.toml"):
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, Path(folder, name))
            Path(folder, args.module).write_text(mutant[0], encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *args.tests]
            environment = os.environ | {"PYTHONPATH": folder}
            try:
                run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=args.timeout)
            except subprocess.TimeoutExpired:
                return False
            return run.returncode == 0

    if survives((source, "nothing")) is False:
        print("error: the tests fail without any change", file=sys.stderr)
        return 2
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, survived in zip(mutants, pool.map(survives, mutants), strict=True):
            if survived:
                survivors += 1
                print(f"{args.module}: nobody noticed {mutant[1]}", flush=True)
    print(f"{args.module}: {len(mutants)} mutants, {len(mutants) - survivors} noticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
