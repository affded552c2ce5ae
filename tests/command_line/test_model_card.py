"""The model card names the model, its licence and the command, and shows names as they are."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import SHORT, run
from gguf_models import llama, write_gguf
from huggingface_hub import metadata_load

from safe_core.command_line.base_model import describe_base
from safe_core.command_line.model_card import code, escaped, markdown_table
from safe_core.command_line.pruning import PruningJob, prune_folder


def test_names_cannot_write_markdown_or_html(folder: Path, text: Path, tmp_path: Path) -> None:
    name = "a_b `c` <script>alert(1)<|script>\n# [x](y)"
    source = Path(shutil.copytree(folder, tmp_path / name))
    calibration = tmp_path / "<b>|*text*.txt"
    calibration.write_text(text.read_text())
    out = tmp_path / "out"
    result = run(
        "prune", source, "--calibration", calibration, "--out", out, *SHORT, "--method",
        "magnitude", "--only", "up|`|<i>",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    lines = card.splitlines()
    title = r"# a\_b \`c\` &lt;script>alert(1)&lt;|script>\\n\# \[x\](y), pruned"
    assert title in lines
    assert sum(line.startswith("#") for line in lines) == 7
    shown, _, rest = card.partition("```bash\n")
    command, _, rest = rest.partition("\n```\n")
    assert "\n" not in command
    assert "<b>" not in shown + rest
    assert r"| &lt;b>\|\*text\*.txt |" in card
    assert r"those whose name matches `` up\|`\|<i> `` |" in card
    for row in (line for line in lines if line.startswith("|")):
        assert row.endswith("|")


def test_escapes() -> None:
    assert escaped("2:4 & more") == "2:4 &amp; more"
    assert escaped("a\x1b[0m") == r"a\\x1b\[0m"
    assert code("a``b`") == "``` a``b` ```"
    assert markdown_table(("a",), [("x|y",)]).splitlines()[-1] == r"| x\|y |"


def pruned(source: Path, text: Path, out: Path, *more: object) -> str:
    result = run(
        "prune", source, "--calibration", text, "--out", out, *SHORT, "--method", "wanda", *more
    )
    assert result.exit_code == 0, result.output
    return (out / "README.md").read_text()


def rows(card: str, header: str) -> list[list[str]]:
    """The rows of the table with a header, in cells."""
    _, _, table = card.partition(f"| {header} |")
    lines = table.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_blocks_have_their_errors_and_sparsities(folder: Path, text: Path, tmp_path: Path) -> None:
    card = pruned(folder, text, tmp_path / "out", "--sparsity", "0.5", "--sparsity", "0.*up=2:8")
    blocks = rows(card, "block | sparsity | error | seconds")
    assert [row[:2] for row in blocks] == [
        ["`model.layers.0`", "55.5556%"],
        ["`model.layers.1`", "50.0000%"],
    ]
    assert all(0 < float(row[2]) < 1 for row in blocks)
    weights = rows(card, "weight | shape | zeros | sparsity")
    assert len(weights) == 14
    assert ["`model.layers.0.mlp.up_proj.weight`", "32 x 16", "384", "75.0000%"] in weights
    assert "| achieved sparsity | 52.777778% of 4,608 pruned entries |" in card


def test_the_command_can_be_given_again(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    card = pruned(
        folder, text, out, "--sparsity", "2:4", "--ignore", "a `b`* c|q_proj", "--device", "cpu",
        "--trust-remote-code",
    )  # fmt: skip
    (command,) = re.findall("## Command\n\n```bash\n(.*)\n```\n", card)
    words = shlex.split(command)
    assert words[:3] == ["safe-core", "prune", str(folder)]
    assert "--trust-remote-code" in words
    assert "--epochs" not in words
    shutil.rmtree(out)
    assert run(*words[1:]).exit_code == 0
    again = (out / "README.md").read_text()
    assert re.findall("```bash\n(.*)\n```", again) == [command]
    job = PruningJob(folder, [text], method="magnitude", samples=4, length=32)
    prune_folder(job, tmp_path / "python")
    assert "## Command" not in (tmp_path / "python" / "README.md").read_text()


def test_discarded_training_is_told(folder: Path, text: Path, tmp_path: Path) -> None:
    result = run(
        "prune", folder, "--calibration", text, "--out", tmp_path / "out", *SHORT, "--epochs", 2,
        "--learning-rate", 50, "--work-dir", tmp_path / "work",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr.count(", start kept: training did not improve it, ") == 2
    note = "raining did not lower the error of 2 of 2 blocks on the samples; they keep their start"
    assert f"note: t{note}; a lower --learning-rate or more --epochs may" in result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    blocks = rows(card, "block | sparsity | error | seconds | training")
    assert [row[-1] for row in blocks] == ["start kept", "start kept"]
    assert f"\nT{note}.\n" in card


LICENCES: list[tuple[dict[str, str], dict[str, str], str]] = [
    (
        {"README.md": "---\nlicense: other\nlicense_name: big\nlicense_link: https://x/y\n---\n"},
        {"license": "other", "license_name": "big", "license_link": "https://x/y"},
        "other, big, https://x/y",
    ),
    ({"README.md": "---\nlicense: mit\n---\n# Hi"}, {"license": "mit"}, "mit"),
    ({"LICENSE.txt": "All"}, {"license": "other", "license_link": "LICENSE.txt"},
     "see the file `LICENSE.txt`"),
    ({"README.md": "---\nlicense: [a]\n---\n"}, {}, "not stated in its files"),
    ({"README.md": "---\nlicense: mit\n---\n", "COPYING": ""}, {"license": "mit"},
     "mit; see the file `COPYING`"),
    ({"README.md": "---\n- license\n---\n"}, {}, "not stated in its files"),
    ({"README.md": "---\n: {\n---\n"}, {}, "not stated in its files"),
    ({}, {}, "not stated in its files"),
]  # fmt: skip


@pytest.mark.every_second
@pytest.mark.parametrize(("files", "front", "said"), LICENCES)
def test_the_licence_is_that_of_the_files(
    folder: Path, text: Path, tmp_path: Path, files: dict[str, str], front: Any, said: str
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    for name, content in files.items():
        (source / name).write_text(content)
    out = tmp_path / "out"
    card = pruned(source, text, out)
    assert f"| licence | {said} |" in card
    assert f"| folder | `{source}` |" in card
    found = metadata_load(out / "README.md")
    assert {key: x for key, x in found.items() if key.startswith("license")} == front
    assert found["library_name"] == "transformers"
    assert "base_model" not in found
    link = front.get("license_link", "")
    assert not link or "/" in link or (out / link).is_file()


def test_a_model_of_the_hub_is_named(folder: Path, text: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--big-org--tiny.1" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"_name_or_path": "other/base"}))
    out = tmp_path / "out"
    card = pruned(snapshot, text, out)
    assert metadata_load(out / "README.md")["base_model"] == "big-org/tiny.1"
    assert "# big-org/tiny.1, pruned" in card
    assert "| name | [big-org/tiny.1](https://huggingface.co/big-org/tiny.1) |" in card


def test_a_gguf_file_says_what_it_is(tmp_path: Path) -> None:
    said = {
        "general.license": "apache-2.0",
        "general.license.link": "https://x",
        "general.source.huggingface.repository": "org/tiny",
    }
    write_gguf(tmp_path / "tiny.gguf", llama(), metadata=said)
    found = describe_base(tmp_path, tmp_path / "tiny.gguf")
    assert found.name == found.hub_id == "org/tiny"
    assert found.licence == {"license": "apache-2.0", "license_link": "https://x"}
    write_gguf(tmp_path / "tiny.gguf", llama())
    found = describe_base(tmp_path, tmp_path / "tiny.gguf")
    assert found == ("tiny", None, {}, None)
