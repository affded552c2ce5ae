"""Run commands of ``safe-core`` in tests, and make a small language model for them."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from safe_core.command_line.app import app

__all__ = ["SHORT", "TEXT", "byte_tokenizer", "config", "failed", "refused", "run"]

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(120))
SHORT = ["--samples", "4", "--length", "32"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that must fail, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("safe-core: ")
    return result.stderr


def failed(*arguments: object) -> str:
    """The message of a command that must fail after it has begun, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    _, begun, message = result.stderr.partition("safe-core: ")
    return begun + message


def byte_tokenizer() -> Any:
    """A token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


def config(**changes: Any) -> Any:
    settings = {
        "vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaConfig(**settings | changes)
