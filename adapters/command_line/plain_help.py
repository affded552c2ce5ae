"""Show brackets in help texts, and wrap each paragraph."""

from __future__ import annotations

from typing import Any

import typer.core

__all__ = ["PlainHelp"]


class PlainHelp(typer.core.TyperCommand):
    """A command whose help shows brackets, and no type for a flag, and wraps each paragraph once.

    typer reads help texts as markup of rich, which drops a word in brackets, such as
    ``safe-core[torch]``, and it keeps the line breaks of docstrings.

    Examples
    --------
    >>> PlainHelp("greet", help="Greet.\\n\\nUse pip install\\nother[extra].").help
    'Greet.\\n\\nUse pip install other\\\\[extra].'
    """

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        if not typer.core.HAS_RICH or self.rich_markup_mode != "rich":
            return
        from rich.markup import escape

        parts: list[Any] = [self, *self.params]
        for part in parts:
            text = getattr(part, "help", None)
            if text:
                paragraphs = text.split("\n\n")
                part.help = escape("\n\n".join(" ".join(p.split()) for p in paragraphs))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with ``--help``; a flag shows no type, because it takes no value.

        Examples
        --------
        >>> command = PlainHelp("greet")
        >>> [option.metavar for option in command.get_params(typer.Context(command))]
        ['']
        """
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params
