"""Provide a small model folder, and a text to calibrate and measure with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from command_line import TEXT, byte_tokenizer, config


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16, and a text beside it."""
    path = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config()).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
