"""Configuration of the documentation site."""

import atexit
import shutil
import sys
import tempfile
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_extensions"))

# The code on the pages runs in this process. What it writes goes away when the process ends.
tempfile.tempdir = tempfile.mkdtemp(prefix="safe_core_docs_")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

project = "safe_core"
author = "The safe_core developers"
copyright = "2026, the safe_core developers"
version = release = installed_version("safe-core")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "mathml",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = [
    "_build",
    "benchmarks_table.md",
    "benchmarks_gpu_table.md",
    "blocks_table.md",
    "demo_table.md",
    "digits_tables.md",
    "elsa_table.md",
    "overparameterisation_tables.md",
    "jax/setup.md",
    "litert_speed_table.md",
    "litert_table.md",
    "pytorch/setup.md",
    "savings_table.md",
    "smaller_networks_table.md",
    "smollm2_table.md",
    "untuned_ablations.md",
    "untuned_table.md",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "safe_core"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

# Examples in docstrings run with the tests; here the code of the pages runs.
doctest_test_doctest_blocks = ""
trim_doctest_flags = True
