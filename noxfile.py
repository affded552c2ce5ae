"""Check the library: lint, types, docs, tests and equivalence; run the demo and benchmarks.

``nox`` runs all checks: lint, then the tests beside docs and types. ``nox -s lowest`` tests the
lowest versions. With ``--no-venv``, sessions install nothing and use the current environment.
"""

from __future__ import annotations

import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nox

# Tests run small programs once, so XLA takes longer to compile them than to run them. These
# settings compile with few optimisations and the older code generator, which halves the time. They
# write no tracebacks into programs, which saves about a fifth of the rest. They keep the programs
# for the other processes and for later runs.
JAX_SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.resolve() / ".nox" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    # On a GPU, JAX reserves three quarters of the memory, which the other processes then lack, and
    # multiplies float32 matrices in TF32, which keeps three digits.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "tests_beside_docs_and_types"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"


def install(session: nox.Session) -> None:
    """Install the library as a user would, with the tools of all checks."""
    if session.virtualenv.is_sandboxed:
        session.install("-c", "constraints.txt", ".[all]")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on every backend; arguments go to pytest, such as ``-m long``."""
    install(session)
    run_tests(session)


@nox.session
def tests_beside_docs_and_types(session: nox.Session) -> None:
    """Run the tests beside docs and then types, each of which keeps one core busy."""
    install(session)
    with ThreadPoolExecutor(1) as other:  # silent: print failures only
        others = [other.submit(check, session, silent=True) for check in (build_docs, check_types)]
        try:
            run_tests(session)
        finally:
            for done in others:
                done.result()


def run_tests(session: nox.Session) -> None:
    """Run pytest; neighbouring tests stay in one process, where they share compiled programs."""
    chosen = ("-m", "not long", *session.posargs)
    processes = ("-n", "2", "--dist", "worksteal")
    session.run("pytest", *processes, "--durations=25", *chosen, env=JAX_SETTINGS)


@nox.session
def equivalence(session: nox.Session) -> None:
    """Test that NumPy, PyTorch and JAX agree, on a GPU if there is one."""
    install(session)
    command = ("pytest", "-n", "2", "tests/equivalence", *session.posargs)
    session.run(*command, env=JAX_SETTINGS)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, with warnings as errors, and run the code of its pages."""
    install(session)
    build_docs(session)


def build_docs(session: nox.Session, *, silent: bool = False) -> None:
    """Build the site, check its links, and run the code of the pages, which Sphinx has read."""
    build = ("sphinx-build", "-W", "-d", "docs/_build/doctrees")
    html, doctest = ("docs", "docs/_build/html"), ("docs", "docs/_build/doctest")
    session.run(*build, "--keep-going", "-b", "html", *html, silent=silent)
    session.run("python", "docs/check_site.py", html[1], silent=silent)
    session.run(*build, "-b", "doctest", *doctest, silent=silent, env=JAX_SETTINGS)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the installed package strictly."""
    install(session)
    check_types(session)


def check_types(session: nox.Session, *, silent: bool = False) -> None:
    """Check an installed copy, because the folders here differ from the import paths."""
    with tempfile.TemporaryDirectory() as site:
        copy = ("pip", "install", "-q", "--no-deps", "--target", site, ".")
        session.run("python", "-m", *copy, silent=silent)
        session.run("mypy", f"{site}/safe_core", silent=silent)


# Tests of every backend, compiled and eager, and of both adapters; about a minute and a half.
LOWEST_TESTS = (
    "tests/core/test_array_kinds.py",
    "tests/core/test_distribution.py",
    "tests/core/test_schedules.py",
    "tests/jax/test_optax_adapter.py",
    "tests/torch/test_adapter.py",
)
LOWEST_TOOLS = ("array-api-strict", "expecttest", "hypothesis", "ml-dtypes", "pytest")


def lowest_versions() -> list[str]:
    """Return the lowest version of each package that pyproject.toml admits, as pins for pip."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["jax"], *extras["dev"]]
    pins = [line.replace(">=", "==") for line in wanted if ">=" in line]
    # PyPI has the lowest torch for CUDA only, which takes gigabytes: test with that of the CI.
    pinned = Path("constraints.txt").read_text().splitlines()
    return [*pins, *(line for line in pinned if line.startswith("torch=="))]


@nox.session(venv_backend="venv")
def lowest(session: nox.Session) -> None:
    """Run a part of the tests with the lowest versions of all packages but torch."""
    pins = Path(session.create_tmp()) / "lowest.txt"
    pins.write_text("\n".join(lowest_versions()) + "\n")
    session.install("-c", str(pins), ".[torch,jax]", *LOWEST_TOOLS)
    session.run("pytest", *(session.posargs or LOWEST_TESTS), env=JAX_SETTINGS)


@nox.session
def eight_bit(session: nox.Session) -> None:
    """Test the 8-bit optimizers of torchao and bitsandbytes as base optimizers."""
    install(session)
    if session.virtualenv.is_sandboxed:  # apart, because Transformers imports what it finds
        session.install("-c", "constraints.txt", "torchao", "bitsandbytes")
    session.run("pytest", "tests/torch/test_low_bit.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo; arguments go to ``safe-core demo``."""
    install(session)
    session.run("safe-core", "demo", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Compare speed and memory with other libraries; arguments go to ``python -m benchmarks``."""
    install(session)
    session.run("python", "-m", "benchmarks", *session.posargs)
