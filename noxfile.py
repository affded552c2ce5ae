"""Sessions: lint, types, docs, tests, equivalence, demo, benchmarks.

``nox`` runs the first five. With ``--no-venv`` a session uses the environment that it
is started in and installs nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nox

# Most of the time of tests is XLA compiling small programs that run once: with few
# optimisations, and each only once for all processes and later runs.
COMPILE_JAX_ONCE = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.resolve() / ".nox" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["lint", "types", "docs", "tests", "equivalence"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"


def install(session: nox.Session) -> None:
    """Install the library, not editable, with everything that the checks need."""
    if session.virtualenv.is_sandboxed:
        session.install("-c", "constraints.txt", ".[all]")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite over every backend; arguments go to pytest, such as ``-m long``."""
    install(session)
    chosen = ("-m", "not equivalence and not long", *session.posargs)
    session.run("pytest", "-n", "2", "--durations=25", *chosen, env=COMPILE_JAX_ONCE)


@nox.session
def equivalence(session: nox.Session) -> None:
    """The same runs through NumPy, PyTorch and JAX; on a GPU where there is one."""
    install(session)
    session.run("pytest", "-n", "2", "tests/equivalence", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, warnings as errors, and the code of its pages."""
    install(session)
    build = ("sphinx-build", "-W", "-d", "docs/_build/doctrees")
    session.run(*build, "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run(*build, "-b", "doctest", "docs", "docs/_build/doctest", env=COMPILE_JAX_ONCE)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package as a wheel installs it, strictly."""
    install(session)
    config, source = str(Path("pyproject.toml").resolve()), str(Path.cwd())
    with tempfile.TemporaryDirectory() as site:
        session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--target", site, source)
        session.chdir(site)  # so that no folder of the repository shadows the package
        env = {"MYPYPATH": site}
        session.run("mypy", "--config-file", config, "--package", "safe_core", env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """The demo; arguments go to ``safe-core demo``."""
    install(session)
    session.run("safe-core", "demo", *session.posargs)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Speed and memory against peers; arguments go to ``python -m benchmarks``."""
    install(session)
    session.run("python", "-m", "benchmarks", *session.posargs)
