"""Read recipes from TOML, and keep them with the results of a study."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .own import Source, own_function
from .recipe import Recipe
from .tables import read

__all__ = [
    "CODE", "RECIPE", "installed_recipes", "keep_recipe", "kept_recipe", "parse_recipe",
    "read_recipe", "recipe_source", "replace_file",
]  # fmt: skip

RECIPE = "recipe.toml"
CODE = "code"  # the folder of the copies of files that a recipe names


def parse_recipe(
    source: str,
    folder: Path | None = None,
    *,
    allow_code: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Recipe:
    """Return the recipe that a TOML text describes.

    This runs the code of files in ``folder`` that the recipe names.

    Parameters
    ----------
    source : str
    folder : Path, optional
        Folder of the recipe, by default the current folder.
    allow_code : bool
        Whether code of other folders and of installed modules runs too.
    say : callable
        Receives one line of text for each file or module, before its code runs.

    Raises
    ------
    TypeError, ValueError
        If the text is not TOML, or a key is missing, unknown or of the wrong type. The message
        names the key and what it accepts.

    Examples
    --------
    >>> parse_recipe('title = "mine"')
    Traceback (most recent call last):
        ...
    ValueError: data is missing in recipe
    """
    beside = Path() if folder is None else folder

    def find(path: Path) -> Path:
        return beside / path if (beside / path).is_file() else path

    return _parsed(source, Source(find, beside, allow_code), say)


def kept_recipe(out: Path, *, runs: bool = False) -> Recipe:
    """Return the recipe in the folder of a study, with the copies of files kept there.

    Their code runs only with ``runs=True``.
    """

    def find(path: Path) -> Path:
        return out / CODE / path.name

    where = Source(find, out / CODE, anywhere=runs, runs=runs)
    return _parsed((out / RECIPE).read_text(encoding="utf-8"), where)


def keep_recipe(recipe: Recipe, source: str, out: Path) -> Recipe:
    """Copy a recipe and the files that it names to the folder of a study; return the recipe there.

    Each file is replaced as a whole, so that other processes never read a part of it.
    """
    for file in recipe.files:
        (out / CODE).mkdir(exist_ok=True)
        replace_file(out / CODE / file.name, file.read_bytes())
    replace_file(out / RECIPE, source.encode())
    return kept_recipe(out, runs=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it, unless it has this content."""
    if path.is_file() and path.read_bytes() == content:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _parsed(source: str, where: Source, say: Callable[[str], object] = lambda text: None) -> Recipe:
    try:
        content = tomllib.loads(source)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"recipe must be TOML: {error}") from None
    named = [(f"methods[{i}]", "method", t) for i, t in _tables(content.get("methods"))]
    named += [
        (k, "name", content[k]) for k in ("data", "model") if isinstance(content.get(k), dict)
    ]
    code: dict[str, None] = {}
    for place, key_, table_ in named:
        value = table_.get(key_)
        if isinstance(value, str) and ":" in value:
            table_[key_] = own = own_function(f"{place}.{key_}", value, where)
            code[own.source] = None
    for name in code:
        say(f"running the code of {name}, which the recipe names")
    return read(Recipe, "recipe", content)


def _tables(value: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return the tables in a list, with their places. Other values are refused elsewhere."""
    listed = value if isinstance(value, list) else []
    return [(i, x) for i, x in enumerate(listed) if isinstance(x, dict)]


def read_recipe(path: Path | Traversable) -> Recipe:
    """Return the recipe in a file; see `parse_recipe`.

    Examples
    --------
    >>> from importlib.resources import files
    >>> read_recipe(files("safe_core.study") / "recipes" / "table-2-digits.toml").model.name
    'lenet-300-100'
    """
    folder = path.parent if isinstance(path, Path) else None
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), folder)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def recipe_source(path: Path) -> tuple[str, str]:
    """Return the name and the text of a recipe, given a file or the name of an installed recipe.

    Raises
    ------
    ValueError
        If there is no such file or recipe.

    Examples
    --------
    >>> name, source = recipe_source(Path("table-2-digits"))
    >>> name, parse_recipe(source).title
    ('table-2-digits', 'Noisy labels, digits')
    """
    if path.is_file():
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"recipe must be TOML in UTF-8, got other bytes in {path}") from None
    folder = files("safe_core.study") / "recipes"
    shipped = {file.name.removesuffix(".toml"): file for file in folder.iterdir()}
    if path.name != str(path) or path.stem not in shipped:
        raise ValueError(
            f"recipe must be an existing file, or one of {', '.join(sorted(shipped))}, got "
            f"{str(path)!r}"
        )
    return path.stem, shipped[path.stem].read_text(encoding="utf-8")


def installed_recipes() -> dict[str, str]:
    """Return the titles of the installed recipes by name.

    Examples
    --------
    >>> installed_recipes()["table-2-digits"]
    'Noisy labels, digits'
    """
    folder = files("safe_core.study") / "recipes"
    texts = {p.name.removesuffix(".toml"): p.read_text(encoding="utf-8") for p in folder.iterdir()}
    return {name: tomllib.loads(text)["title"] for name, text in sorted(texts.items())}
