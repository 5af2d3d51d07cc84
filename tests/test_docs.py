"""Every Python snippet of the documentation runs, each after those above it on its page."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page):
    """Line number and text of each."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


SNIPPETS = [(page, i, line + 1) for page in PAGES for i, (line, _) in enumerate(snippets(page))]


@pytest.fixture(scope="module")
def namespaces():
    """The variables of each page, and how many of its snippets have run."""
    return {page: [{"__name__": page.stem}, 0] for page in PAGES}


@pytest.mark.parametrize(("page", "i"), [(p, i) for p, i, _ in SNIPPETS], ids=[f"{p.name}:{n}" for p, _, n in SNIPPETS])
def test_snippet_runs(page, i, namespaces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, done = namespaces[page]
    for line, text in snippets(page)[done : i + 1]:
        exec(compile("\n" * line + text, page, "exec"), namespace)
        namespaces[page][1] += 1


def test_migrating_page_has_snippets():
    assert len(snippets(ROOT / "docs" / "migrating.md")) > 10
