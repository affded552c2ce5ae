"""Show brackets in help texts, and wrap each paragraph."""

from __future__ import annotations

from typing import Any

import typer.core

__all__ = ["PlainHelp"]


class PlainHelp(typer.core.TyperCommand):
    """A command whose help shows brackets, and wraps each paragraph once.

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
