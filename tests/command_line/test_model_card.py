"""The model card shows names as they are, whatever they hold."""

from __future__ import annotations

import shutil
from pathlib import Path

from command_line import SHORT, run

from safe_core.command_line.model_card import code, escaped, markdown_table


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
    assert sum(line.startswith("#") for line in lines) == 5
    assert "<b>" not in card
    assert r"| &lt;b>\|\*text\*.txt |" in card
    assert r"those whose name matches `` up\|`\|<i> `` |" in card
    for row in (line for line in lines if line.startswith("|")):
        assert row.endswith("|")


def test_escapes() -> None:
    assert escaped("2:4 & more") == "2:4 &amp; more"
    assert escaped("a\x1b[0m") == r"a\\x1b\[0m"
    assert code("a``b`") == "``` a``b` ```"
    assert markdown_table(("a",), [("x|y",)]).splitlines()[-1] == r"| x\|y |"
