"""Chats as texts: messages go through the tokenizer's chat template, and wrong ones are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from command_line import SHORT, TEXT, byte_tokenizer, failed, run

from safe_core.command_line.chats import chat_renderer
from safe_core.command_line.model_folder import load_tokenizer
from safe_core.command_line.perplexity import text_tokens
from safe_core.command_line.pruning import PruningJob
from safe_core.command_line.text_files import read_text_file

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}"
)
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
SAID = "<user>Hello</><assistant>Good day</>"


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    path = Path(shutil.copytree(folder, tmp_path / "chatty"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def lines(file: Path, *records: object) -> Path:
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_messages_and_texts_become_chats(chatty: Path, tmp_path: Path) -> None:
    chat = chat_renderer(load_tokenizer(chatty))
    file = lines(
        tmp_path / "data.jsonl", {"messages": HELLO, "text": "not this"}, {"text": "Hm"}, HELLO
    )
    assert read_text_file(file, chat=chat).text == f"{SAID}<user>Hm</>{SAID}"
    named = lines(tmp_path / "named.jsonl", {"talk": HELLO}, {"talk": "Hm"})
    assert read_text_file(named, "talk", chat).text == f"{SAID}<user>Hm</>"
    table = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [HELLO, HELLO]}), table)
    assert read_text_file(table, chat=chat).text == SAID * 2
    plain = tmp_path / "plain.txt"
    plain.write_text("one\n\ntwo")
    assert read_text_file(plain, chat=chat).text == "<user>one\n\ntwo</>"
    tokens = text_tokens(load_tokenizer(chatty), [plain, named], "talk", chat_template=True)
    wanted = f"<user>one\n\ntwo</>{SAID}<user>Hm</>"
    assert tokens.tolist() == byte_tokenizer()(wanted)["input_ids"]


def test_the_template_adds_the_special_tokens_itself() -> None:
    class Tokenizer:
        chat_template = "any"

        def apply_chat_template(self, messages: object, tokenize: bool) -> str:
            return "x"

        def __call__(self, text: str, verbose: bool, add_special_tokens: bool = True) -> object:
            return {"input_ids": [0] * add_special_tokens + [1] * len(text)}

    file = Path(__file__)
    assert text_tokens(Tokenizer(), [file], chat_template=True).tolist() == [1]
    assert text_tokens(Tokenizer(), [file])[0] == 0


def test_commands_take_chats(chatty: Path, tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": TEXT[i : i + 90]}] for i in range(0, 900, 90)]
    file = lines(tmp_path / "data.jsonl", *({"talk": talk} for talk in talks))
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(f"<user>{talk[0]['content']}</>" for talk in talks))
    options = ["--field", "talk", "--chat-template"]
    measure = ["--length", 32, "--device", "cpu", "--json"]
    found = run("perplexity", chatty, "--text", file, *options, *measure)
    assert found.exit_code == 0, found.output
    assert found.stdout == run("perplexity", chatty, "--text", plain, *measure).stdout
    outs = []
    for name, calibration in (("chats", [file, *options]), ("plain", [plain])):
        outs.append(tmp_path / name)
        prune = ["prune", chatty, "--calibration", *calibration, "--out", outs[-1], *SHORT]
        result = run(*prune, "--method", "wanda")
        assert result.exit_code == 0, result.output
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    card = (outs[0] / "README.md").read_text()
    assert "tokens of chats, made by the tokenizer's chat template, in the field `talk` of" in card
    assert (outs[0] / "chat_template.jinja").read_text() == TEMPLATE


def test_wrong_messages_are_named_with_their_line(chatty: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    measure = ["perplexity", chatty, "--text", file, "--chat-template"]
    for value, said in (
        ([{"role": "tool", "content": ""}], "the chat template refuses them: no tools here"),
        ([{"from": "human", "value": "x"}], 'an object with a "role" and a "content", got {\'from'),
        ([{"role": 3, "content": "x"}], 'an object with a "role" and a "content", got {'),
        ([{"role": "user"}], 'an object with a "role" and a "content", got {'),
        (["x"], 'an object with a "role" and a "content", got \'x\''),
        ([], "they must be a list of messages, got []"),
        ({"role": "user", "content": "x"}, "they must be a list of messages, got {"),
        (3, "they must be a list of messages, got 3"),
    ):
        lines(file, {"messages": HELLO}, {"messages": value})
        message = failed(*measure)
        assert f"{file} must hold messages in line 2: " in message
        assert said in message
        assert message.count("\n") == 1
    lines(file, {"chat": HELLO})
    assert "the field 'messages' or 'text' in each record, got 'chat' in line 1" in failed(*measure)
    assert "got [{'content': 'Hello', 'role': 'user'}, {'content'" in failed(
        *measure[:-1], "--field", "chat"
    )
    assert "in line 1: pass --chat-template to turn messages into text" in failed(
        *measure[:-1], "--field", "chat"
    )


def test_without_a_template_the_option_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    for command in (
        ["perplexity", folder, "--text", text],
        ["prune", folder, "--calibration", text, "--out", tmp_path / "out", *SHORT],
    ):
        message = failed(*command, "--chat-template")
        assert "tokenizer must have a chat template for --chat-template, got none" in message
    with pytest.raises(ValueError, match="chat_template must be left out for inputs"):
        PruningJob("model", inputs="images.npz", chat_template=True)
