"""The wheel installs one import name and all of its parts."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_constraints_pin_packages_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)


def test_wheel_holds_one_package_with_all_modules(tmp_path, monkeypatch):
    # Other checks build the package at the same time, so this build has a folder of its own.
    settings = tmp_path / "setup.cfg"
    settings.write_text(f"[build]\nbuild_base = {tmp_path}\n[egg_info]\negg_base = {tmp_path}\n")
    monkeypatch.setenv("DIST_EXTRA_CONFIG", str(settings))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"safe_core"}
    sources = {
        "safe_core": "",
        "backends": "backends/",
        "adapters/torch": "adapters/torch/",
        "adapters/jax": "adapters/jax/",
        "adapters/command_line": "command_line/",
        "benchmarks/demo": "demo/",
        "benchmarks/study": "study/",
    }
    expected = {
        f"safe_core/{prefix}{file.relative_to(ROOT / folder)}"
        for folder, prefix in sources.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    recipes = {
        f"safe_core/study/recipes/{file.name}"
        for file in (ROOT / "benchmarks/study/recipes").glob("*.toml")
    }
    assert len(recipes) > 20
    assert expected | recipes | {"safe_core/py.typed"} <= names
