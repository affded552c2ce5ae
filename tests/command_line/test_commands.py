"""The program ``safe-core``: how it finds its commands and reports their errors."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from safe_core._installed import install_command
from safe_core.command_line.app import GROUP, app, build_app
from safe_core.command_line.errors import needs

COMMANDS = {
    *("advise", "compress", "decompress", "demo", "inspect", "perplexity", "prune", "report"),
    "study",
}


def invoke(*arguments: object, program: typer.Typer = app) -> Result:
    return CliRunner().invoke(program, [str(a) for a in arguments])


def message(*arguments: object, program: typer.Typer = app) -> str:
    """The message of a command that must fail, without a traceback."""
    result = invoke(*arguments, program=program)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("safe-core: ")
    return result.stderr


def other_package(
    folder: Path, source: str, monkeypatch: pytest.MonkeyPatch, name: str = "other-package"
) -> None:
    """Install a package, as far as importlib can see, with a command ``greet``."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    requires = 'Requires-Dist: torch>=2; extra == "gpu"\n'
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nProvides-Extra: gpu\n{requires}"
    )
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ngreet = {module}:greet\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)  # of an earlier test


def installed() -> typer.Typer:
    return build_app(metadata.entry_points(group=GROUP))


GREET = '''
def greet(name: str) -> None:
    """Greet someone."""
    if name == "nobody":
        raise ValueError("name must be of somebody, got 'nobody'")
    print(f"hello {name}")
'''


# Finding commands


def test_help_is_quick_and_lists_all_commands() -> None:
    program = (
        "import sys; from safe_core.command_line.app import app\n"
        "heavy = {'torch', 'transformers', 'jax', 'matplotlib', 'sklearn', 'scipy'}\n"
        "try: app(['--help'])\n"
        "except SystemExit: print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.rstrip().endswith("[]")
    words = {line.split()[1] for line in result.stdout.splitlines() if len(line.split()) > 2}
    assert words >= COMMANDS


def test_own_commands_are_entry_points() -> None:
    own = metadata.distribution("safe-core").entry_points.select(group=GROUP)
    assert {entry.name for entry in own} == COMMANDS
    assert set(typer.main.get_command(app).commands) >= COMMANDS


def test_another_package_adds_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_package(tmp_path, GREET, monkeypatch)
    program = installed()
    listed = invoke("--help", program=program).stdout
    assert "Commands of other-package" in listed
    assert listed.index(" study ") < listed.index("greet")
    assert invoke("greet", "you", program=program).stdout == "hello you\n"
    assert message("greet", "nobody", program=program) == (
        "safe-core: name must be of somebody, got 'nobody'\n"
    )


def test_a_broken_command_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_package(tmp_path, "from math import nothing", monkeypatch)
    program = installed()
    help_text = invoke("--help", program=program)
    assert help_text.exit_code == 0
    assert "Cannot be imported" in help_text.stdout
    result = invoke("greet", "you", "--loud", program=program)
    assert isinstance(result.exception, ImportError)
    assert "cannot import name 'nothing'" in str(result.exception)


def test_two_packages_with_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_package(tmp_path, GREET, monkeypatch)
    other_package(tmp_path, GREET, monkeypatch, name="third")
    with pytest.raises(SystemExit, match=r"other-package and third both register .* 'greet'"):
        installed()


def test_no_commands() -> None:
    with pytest.raises(SystemExit, match="no commands are registered; install the package again"):
        build_app([])


@pytest.mark.parametrize("source", ["broken", "fine"])
def test_help_shows_brackets_and_wraps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    words = "pip install other[gpu] and much more in one line of some eighty letters"
    text = f"raise ImportError({words!r})"
    if source == "fine":
        text = (
            "from typing import Annotated\nimport typer\n"
            f"def greet(loud: Annotated[int, typer.Option(help={words!r})] = 1) -> None:\n"
            f'    """Greet [someone].\n\n    {words}\n    or [/none].\n    """\n'
        )
    other_package(tmp_path, text, monkeypatch)
    for arguments in (["--help"], ["greet", "--help"]):
        shown = " ".join(invoke(*arguments, program=installed()).stdout.split())
        assert "[gpu]" in shown or (source, arguments) == ("fine", ["--help"])
        assert "[someone]" in shown or source == "broken"
    if source == "fine":
        assert "letters or [/none]." in shown
        assert shown.count("[gpu]") == 2  # of the command, and of the option


def test_help_loses_no_bracket() -> None:
    commands = typer.main.get_command(app).commands
    bracketed = {
        (command, word)
        for command, own in commands.items()
        for text in (own.help, *(getattr(p, "help", None) for p in own.params))
        for word in (text or "").replace("\\[", "[").split()
        if word.startswith("[")
    }
    assert bracketed
    for command, word in sorted(bracketed):
        assert word in invoke(command, "--help").stdout


def test_help_shows_no_type_for_a_flag() -> None:
    shown = invoke("prune", "--help").stdout
    assert "--dry-run" in shown
    assert "bool" not in shown


# Errors


def raising(error: BaseException, **attributes: Any) -> typer.Typer:
    """A program with a command of ours that fails, and one more, or typer drops its name."""

    def fail(batch_size: int = 1) -> None:
        raise error

    def other() -> None:
        raise error

    def load(entry: Any) -> Any:
        return needs("torch", "study")({"fail": fail, "other": other}[entry.name])

    entries = [metadata.EntryPoint(name, "none:none", GROUP) for name in ("fail", "other")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata.EntryPoint, "load", load)
        return build_app(entries)


@pytest.mark.parametrize(
    ("package", "more"),
    [("torch", ""), ("sklearn", ""), ("PIL", ""), ("scipy", ""), ("flax", ",jax")],
)
def test_a_missing_package_is_named_with_the_extras(package: str, more: str) -> None:
    program = raising(ModuleNotFoundError(f"No module named {package!r}", name=package))
    install = install_command("torch", f"study{more}")
    assert message("fail", program=program) == (
        f"safe-core: this command needs {package}: {install}\n"
    )


@pytest.mark.parametrize("name", ["safe_core.nothing", "torch._C", "nmupy", "extra", None])
def test_a_broken_import_shows_its_traceback(name: str | None) -> None:
    error = ModuleNotFoundError("No module named that", name=name)
    assert invoke("fail", program=raising(error)).exception is error


def test_a_missing_package_of_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_package(tmp_path, "import torch\n" + GREET, monkeypatch)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert message("greet", "you", program=installed()) == (
        'safe-core: this command needs torch: pip install "other-package[gpu]"\n'
    )


def test_real_commands_name_missing_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert invoke("inspect", tmp_path / "model.pt").exit_code == 0
    for module in ("model_folder", "perplexity"):  # which other tests imported
        monkeypatch.delitem(sys.modules, f"safe_core.command_line.{module}", raising=False)
    found = message("perplexity", tmp_path, "--text", tmp_path / "text.txt")
    assert 'needs torch: pip install -c constraints.txt -e ".[transformers]"' in found
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "optax", None)
    found = message("demo", "--output", tmp_path / "demo")
    assert 'needs optax: pip install -c constraints.txt -e ".[torch,jax,demo]"' in found
    assert not (tmp_path / "demo").exists()


def test_without_typer_the_extras_are_named() -> None:
    program = "import sys; sys.modules['typer'] = None; import safe_core.command_line.app"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("safe-core: the command line needs typer, which the extra ")
    assert install_command("transformers", "study") in result.stderr


class OutOfMemoryError(RuntimeError):
    """The error of torch for a full device."""


class JaxRuntimeError(RuntimeError):
    """The error of JAX for anything that fails on a device."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("no memory"),
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    ],
)
def test_full_memory_is_reported(error: BaseException) -> None:
    told = f"safe-core: out of memory: {error}\n"
    assert message("fail", program=raising(error)) == f"{told}Try a smaller --batch-size.\n"
    assert message("other", program=raising(error)) == told


def test_an_empty_memory_error_is_reported() -> None:
    assert message("other", program=raising(MemoryError())) == (
        "safe-core: out of memory: MemoryError\n"
    )


def test_a_fault_of_the_program_shows_its_traceback() -> None:
    error = RuntimeError("a fault of the program")
    assert invoke("fail", program=raising(error)).exception is error


def test_notes_of_an_error_are_shown() -> None:
    error = ValueError("it is wrong")
    error.add_note("in this run")
    assert message("fail", program=raising(error)) == "safe-core: it is wrong\nin this run\n"


def test_a_wrong_choice_is_refused() -> None:
    result = invoke("demo", "--framework", "numpy")
    assert result.exit_code == 2
    assert "numpy" in result.stderr
