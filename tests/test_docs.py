"""Every Python snippet of the documentation runs, and what its pages say of the source is so."""

import ast
import doctest
import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import numsru
import numsru.compat

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
SIMULATED = [DOCS / "kernels_cuda.md"]  # run with NUMBA_ENABLE_CUDASIM=1, in a process of their own
MODULES = sorted((ROOT / "numsru").glob("*.py"))


def snippets(page):
    """Line number and text of each."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def padded(line, text):
    """A snippet in which lines have the numbers that they have on the page."""
    return "\n" * line + text


SNIPPETS = [
    (page, i, line + 1) for page in PAGES if page not in SIMULATED for i, (line, _) in enumerate(snippets(page))
]


@pytest.fixture(scope="module")
def namespaces():
    """The variables of each page, and how many of its snippets have run."""
    return {page: [{"__name__": page.stem}, 0] for page in PAGES}


@pytest.fixture
def as_torchrun(monkeypatch):
    """The environment that torchrun gives to the only process of a program."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


# torch's exporter uses what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("page", "i"), [(p, i) for p, i, _ in SNIPPETS], ids=[f"{p.name}:{n}" for p, _, n in SNIPPETS])
def test_snippet_runs(page, i, namespaces, as_torchrun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, done = namespaces[page]
    for line, text in snippets(page)[done : i + 1]:
        exec(compile(padded(line, text), page, "exec"), namespace)
        namespaces[page][1] += 1


@pytest.mark.parametrize("page", SIMULATED, ids=lambda page: page.name)
def test_page_runs_in_the_simulator(page):
    try:
        importlib.import_module("numba.cuda")
    except Exception as error:
        pytest.skip(f"numba.cuda cannot be imported: {error}")
    code = (
        f"for text in {[padded(*snippet) for snippet in snippets(page)]!r}: exec(compile(text, {str(page)!r}, 'exec'))"
    )
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(Path(numsru.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["migrating", "guide", "kernels", "kernels_cuda", "quickstart", "what_is_sru"])
def test_page_has_snippets(name):
    assert snippets(DOCS / f"{name}.md")


def raised_messages():
    """What each `raise` and each note of the source says, with `…` for what is filled in: message to where."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    constants = {}  # texts that have a name
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants |= {target.id: node.value.value for target in node.targets}

    def text_of(part):
        part = part.value if isinstance(part, ast.FormattedValue) else part
        name = getattr(part, "id", None) or getattr(part, "attr", None)  # operators.ONCE is an attribute
        text = constants.get(name) if name else getattr(part, "value", None)
        return text if isinstance(text, str) else "…"

    found = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            if isinstance(node, ast.Raise) or getattr(call.func, "attr", None) == "add_note":
                text = call.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                message = "".join(map(text_of, parts))
                found.setdefault(re.sub("…+", "…", message), f"{path.name}:{node.lineno}")
    return found


def explained_messages():
    """The messages that docs/troubleshooting.md lists."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return {match[2] for match in re.finditer(r"^- (`+) ?(.+?) ?\1\\$", text, re.MULTILINE)}


RAISED = raised_messages()


@pytest.mark.parametrize("message", RAISED, ids=RAISED.values())
def test_error_message_is_explained(message):
    for_any_argument = re.sub(r"^\w+ must", "… must", message)
    assert {message, for_any_argument} & explained_messages(), f"docs/troubleshooting.md lacks: {message}"


def test_no_error_message_is_explained_that_nobody_raises():
    assert len(explained_messages()) > 50
    assert explained_messages() <= RAISED.keys()


NAMED = sorted(
    {
        (page.name, module, name)
        for page in (DOCS / "kernels.md", DOCS / "kernels_cuda.md")
        for module, name in re.findall(r"`(\w+)\.(\w+)`", page.read_text(encoding="utf-8"))
        if (ROOT / "numsru" / f"{module}.py").exists()
    }
)


@pytest.mark.parametrize(("page", "module", "name"), NAMED, ids=[f"{p}:{m}.{n}" for p, m, n in NAMED])
def test_name_in_the_source_exists(page, module, name):
    tree = ast.parse((ROOT / "numsru" / f"{module}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            defined |= {a.id for target in node.targets for a in ast.walk(target) if isinstance(a, ast.Name)}
    assert name in defined


PUBLIC = [*(f"numsru.{name}" for name in numsru.__all__), *(f"numsru.compat.{name}" for name in numsru.compat.__all__)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_in_the_reference(name):
    assert re.search(
        rf"^\.\. auto\w+:: {re.escape(name)}$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def public(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


DOCUMENTED = [*PUBLIC, "numsru.reference.sru_recurrence"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_names_every_argument(name):
    documented = public(name)
    functions = [documented.__init__, documented.forward] if inspect.isclass(documented) else [documented]
    names = {parameter for f in functions for parameter in inspect.signature(f).parameters} - {"self"}
    doc = inspect.getdoc(documented)
    assert not {parameter for parameter in names if not re.search(rf"\b{parameter}\b", doc)}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_says_what_is_raised(name):
    assert re.search(r"^Raises:\n    \w+Error: ", inspect.getdoc(public(name)), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in ("numsru.warmup", "numsru.use_backend")])
def test_docstring_gives_its_source(name):
    assert "\nSource:" in inspect.getdoc(public(name))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_of_the_docstring_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(numsru.compat.SRU(128, 256).state_dict(), "sru.pt")  # what one of them loads
    names = {"torch": torch, "numsru": numsru, name.rpartition(".")[2]: public(name)}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for example in finder.find(public(name), name, globs=names):
        runner.run(example)
    assert not runner.failures
    if name.count(".") == 1:
        assert runner.tries, f"{name} has no example"


def test_citation_is_of_this_version():
    assert f"\nversion: {numsru.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
