"""Configuration of the documentation: `sphinx-build -W -b html -c docs . docs/_build`, from the root of a clone.

The source folder is the root, so that pages beside the code (benchmarks, examples) belong to the site and every link
works there as it does in the repository.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numsru

project, author, version = "numsru", "the numsru developers", numsru.__version__
release = version
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md", "benchmarks/README.md", "benchmarks/results/*.md", "examples/README.md", "examples/results/*.md",
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
]  # fmt: skip
exclude_patterns = ["docs/_build", ".*", "**/.*", "build", "dist", "runs"]
templates_path = ["_templates"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"numsru {version}"
html_additional_pages = {"index": "to_docs.html"}
html_copy_source = False
