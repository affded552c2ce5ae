"""Commands in the README, the documentation and docstrings name what exists."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from safe_core.command_line.app import app
from safe_core.study.runner import recipe_source

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PLACES = ("README.md", "CONTRIBUTING.md", "docs", "examples", "benchmarks", "adapters", "safe_core")
COMMAND = re.compile(
    r"(?:^ *|[`>]|&& |\()(safe-core [a-z]+|python -m benchmarks|python examples/|nox |torchrun |"
    r"accelerate launch )([^`#\n&]*)",
    re.MULTILINE,
)
TOGETHER = "torchrun --nproc-per-node 8 --no-python "
"""Starts a command of the program in several processes."""
PROGRAM = typer.main.get_command(app)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def texts() -> Iterator[str]:
    """Every page, and every docstring of a file that names a command."""
    for place in PLACES:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.*")):
            if file.suffix == ".md":
                yield file.read_text()
            elif file.suffix == ".py" and COMMAND.search(source := file.read_text()):
                for node in ast.walk(ast.parse(source)):
                    if isinstance(node, DOCUMENTED):
                        yield ast.get_docstring(node) or ""


def expanded(text: str) -> str:
    """A text with whole command lines, and the shell variables that it sets filled in."""
    text = re.sub(r"\\\n *", "", text)
    for name, value in re.findall(r'\b([a-z]+)="([^"$]*)"', text):
        text = re.sub(rf"\${name}\b", lambda _, value=value: value, text)
    return text


@functools.cache
def commands() -> list[str]:
    found = (head + rest for text in texts() for head, rest in COMMAND.findall(expanded(text)))
    return sorted({command.strip().strip(".") for command in found})


def starting(*heads: str) -> list[str]:
    return [command for command in commands() if command.startswith(heads)]


def test_the_commands_are_found() -> None:
    assert "safe-core report study-results/table-4-digits" in commands()
    assert "safe-core demo --quick" in commands()
    assert "nox --no-venv -s tests -- -m long" in commands()
    assert len(starting("python examples/", "torchrun", "accelerate launch")) > 15
    assert any("encoder --model minilm" in command for command in commands())
    assert starting("torchrun") == starting("torchrun --standalone", TOGETHER)


@pytest.mark.parametrize("command", starting("safe-core ", f"{TOGETHER}safe-core "))
def test_commands_of_the_program_are_understood(command: str) -> None:
    name, *arguments = shlex.split(command.removeprefix(TOGETHER))[1:]
    known = PROGRAM.commands[name]  # type: ignore[attr-defined]
    if arguments and arguments[-1].startswith("--"):  # the name of an option in a sentence
        assert arguments[-1] in {option for p in known.params for option in p.opts}
    elif arguments:
        known.make_context(name, arguments)  # fails for what it does not know
    if name == "study" and arguments:
        assert recipe_source(Path(arguments[0]))


class Parsed(Exception):  # noqa: N818 - no error
    pass


@pytest.mark.parametrize("command", starting("python -m benchmarks"))
def test_commands_of_the_benchmarks_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse_args(parser, *given)
        raise Parsed

    _, _, module, *arguments = shlex.split(command)
    found = importlib.util.find_spec(module)
    is_package = found is not None and found.submodule_search_locations is not None
    name = f"{module}.__main__" if is_package else module
    main = importlib.import_module(name).main
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        main()


@pytest.mark.parametrize(
    "command", starting("python examples/", "torchrun --standalone", "accelerate launch")
)
def test_examples_exist_and_have_the_options(command: str) -> None:
    before, name, after = re.split(r"(examples/\S+\.py)", command)
    source = (ROOT / name).read_text()
    assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", after))
    assert before in {
        "python ", "torchrun --standalone --nproc-per-node 2 ", "accelerate launch "
    }  # fmt: skip


def test_sessions_exist() -> None:
    sessions = [
        node.name
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    named = [found for command in starting("nox ") for found in re.findall(r"-s (\w+)", command)]
    assert named
    assert set(named) <= set(sessions)
