"""Turn messages into the text of a chat, by the chat template of a tokenizer."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

__all__ = ["chat_renderer"]


def chat_renderer(tokenizer: Any) -> Callable[[Any], str]:
    """Return a function that turns a list of messages into text, by the chat template.

    A message is an object with a ``role`` and a ``content``, as
    ``tokenizer.apply_chat_template`` takes it. A text stands for one message of the user. The
    function raises ValueError for anything else, and where the template refuses the messages.

    Parameters
    ----------
    tokenizer : transformers tokenizer

    Raises
    ------
    ValueError
        If it has no chat template.

    Examples
    --------
    >>> class Tokenizer:
    ...     chat_template = "any"
    ...     def apply_chat_template(self, messages, tokenize):
    ...         return "".join(f"<{m['role']}>{m['content']}" for m in messages)
    >>> chat = chat_renderer(Tokenizer())
    >>> chat("Hello"), chat([{"role": "system", "content": "Be brief."}])
    ('<user>Hello', '<system>Be brief.')
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "tokenizer must have a chat template for --chat-template, got none: leave the option "
            "out, or add the model's chat_template.jinja to its folder"
        )

    def render(value: Any) -> str:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        _check_messages(messages)
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except MemoryError:
            raise
        except Exception as error:  # templates are programs, which may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"the chat template refuses them: {reason}") from error

    return render


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"they must be a list of messages, got {reprlib.repr(messages)}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise ValueError(
                f'each must be an object with a "role" and a "content", got {reprlib.repr(message)}'
            )
