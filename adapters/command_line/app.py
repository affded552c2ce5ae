"""The program ``safe-core``: every command that an installed package registers.

A command is a function for typer. The pyproject.toml of safe_core, or of any other package,
registers it as an entry point of the group ``safe_core.commands``::

    [project.entry-points."safe_core.commands"]
    inspect = "safe_core.command_line.commands.inspect:inspect"

``safe-core --help`` imports all commands, so their modules import little besides typer. A
command imports the rest when it runs. The decorator `needs` names the extras that it requires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from safe_core._installed import install_command

try:
    import typer
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    raise SystemExit(
        "safe-core: the command line needs typer, which the extra transformers brings for pruning, "
        f"and the extra study for studies: {install_command('transformers', 'study')}"
    ) from None

from .errors import with_clear_errors
from .plain_help import PlainHelp

__all__ = ["GROUP", "app", "build_app"]

GROUP = "safe_core.commands"
_OWN = "safe-core"  # the distribution


def build_app(entries: Iterable[EntryPoint]) -> typer.Typer:
    """Build the program from entry points.

    The help lists the commands of safe_core first, then those of other packages under the name
    of the package. A command that cannot be imported is listed too and raises its error when it
    is run, so that the others still work.

    Raises
    ------
    SystemExit
        If there is no command, or two packages register the same name.

    Examples
    --------
    >>> entry = EntryPoint("inspect", "safe_core.command_line.commands.inspect:inspect", GROUP)
    >>> [command.name for command in build_app([entry]).registered_commands]
    ['inspect']
    """
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_main)
    providers: dict[str, str] = {}
    for entry in sorted(entries, key=lambda x: (_provider(x) != _OWN, _provider(x), x.name)):
        provider = _provider(entry)
        other = providers.setdefault(entry.name, provider)
        if other != provider:
            raise SystemExit(
                f"safe-core: {other} and {provider} both register the command {entry.name!r}; "
                "uninstall one of them"
            )
        _add(app, entry, provider)
    if not providers:
        raise SystemExit(
            "safe-core: no commands are registered; install the package again: "
            "pip install safe-core, or pip install -e . in a clone"
        )
    return app


def _main() -> None:
    """Prune transformers, inspect checkpoints, and study sparse training in PyTorch and JAX."""


def _provider(entry: EntryPoint) -> str:
    """Return the name of the distribution of an entry point, or our own if it has none."""
    return _OWN if entry.dist is None else entry.dist.name


def _add(app: typer.Typer, entry: EntryPoint, provider: str) -> None:
    panel = None if provider == _OWN else f"Commands of {provider}"
    try:
        command = entry.load()
    except Exception as error:
        anything = {"ignore_unknown_options": True, "allow_extra_args": True}
        add = app.command(
            entry.name,
            cls=PlainHelp,
            rich_help_panel=panel,
            help=f"Cannot be imported: {error}",
            context_settings=anything,
        )
        add(with_clear_errors(_raising(error), provider))
    else:
        add = app.command(entry.name, cls=PlainHelp, rich_help_panel=panel)
        add(with_clear_errors(command, provider))


def _raising(error: Exception) -> Callable[[typer.Context], Any]:
    def command(context: typer.Context) -> None:
        raise error

    return command


app = build_app(entry_points(group=GROUP))

if __name__ == "__main__":
    app()
