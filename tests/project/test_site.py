"""The check of the site finds dead links, dead anchors and wide code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "check_site.py"


def check(site: Path) -> tuple[int, list[str]]:
    found = subprocess.run(
        [sys.executable, SCRIPT, site], capture_output=True, text=True, timeout=60
    )
    return found.returncode, found.stdout.splitlines() or found.stderr.splitlines()


def test_dead_pages_anchors_and_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "index.html").write_text(
        '<p id="top"></p><a href="deep/page.html#there">a</a> <a href="#top">b</a>'
        '<a href="https://example.org/no">c</a> <a href="deep/page.html#gone">d</a>'
        '<img src="lost.png">'
    )
    (tmp_path / "deep" / "page.html").write_text(
        '<h1 id="there"></h1><a href="../index.html">a</a><a href="../missing.html">b</a>'
    )
    status, found = check(tmp_path)
    assert status == 1
    assert found == [
        "deep/page.html: ../missing.html",
        "index.html: deep/page.html#gone",
        "index.html: lost.png",
    ]


def test_lines_of_code_that_are_wider_than_a_page_are_named(tmp_path: Path) -> None:
    line = "x = " + 95 * "1"
    (tmp_path / "page.html").write_text(
        f"<p>{2 * line}</p><pre><span>x</span> = 1\n<b>{line}</b>1\n{line}22</pre><p>{2 * line}</p>"
    )
    assert check(tmp_path) == (1, [f"page.html: over 100 columns: {line}22"])
    (tmp_path / "page.html").rename(tmp_path / "_modules.html")
    assert check(tmp_path) == (0, [])  # source code, which has no page of the site to fit


def test_a_whole_site_passes_and_an_empty_folder_does_not(tmp_path: Path) -> None:
    status, message = check(tmp_path)
    assert (status, message) == (1, [f"{tmp_path} must hold a built site, got no page"])
    (tmp_path / "index.html").write_text('<p id="top"></p><a href="#top">a</a>')
    assert check(tmp_path) == (0, [])
