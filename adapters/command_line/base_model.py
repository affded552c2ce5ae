"""Find out what the files of a model say about it: its name, its origin and its licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from .gguf_files import gguf_metadata

__all__ = ["BaseModel", "describe_base"]

_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's cache
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "USE_POLICY")
_LICENCE_KEYS = ("license", "license_name", "license_link")


class BaseModel(NamedTuple):
    """The model that is pruned, as its files describe it.

    Attributes
    ----------
    name : str
        Its name on the hub, or that of its GGUF file, or of its folder.
    hub_id : str or None
        ``"organisation/name"`` on the Hugging Face Hub, if it is known.
    licence : dict of str to str
        ``license``, ``license_name`` and ``license_link``, as in the front matter of its model
        card or in the metadata of its GGUF file.
    licence_file : str or None
        The name of a file with the licence, in the folder.
    """

    name: str
    hub_id: str | None
    licence: dict[str, str]
    licence_file: str | None


def describe_base(folder: Path, gguf: Path | None = None) -> BaseModel:
    """Return what the files of a model folder say about the model.

    The id on the hub is that of the hub's cache, if the folder is in it, or that in the metadata
    of a GGUF file. A configuration can name another model there, and is not asked.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "models--org--tiny" / "snapshots" / "0123"
    >>> folder.mkdir(parents=True)
    >>> _ = (folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# Tiny\\n")
    >>> describe_base(folder)
    BaseModel(name='org/tiny', hub_id='org/tiny', licence={'license': 'mit'}, licence_file=None)
    """
    whole = folder.resolve()
    said = {} if gguf is None else gguf_metadata(gguf)
    cached = [_HUB_CACHE.fullmatch(part) for part in (*whole.parts, *folder.absolute().parts)]
    hub_id = next((f"{found[1]}/{found[2]}" for found in cached if found), None)
    if hub_id is None:
        source = str(said.get("general.source.huggingface.repository", ""))
        hub_id = source if _HUB_ID.fullmatch(source) else None
    licence = _of_card(folder / "README.md")
    if not licence:
        keys = {key: f"general.{key.replace('_', '.')}" for key in _LICENCE_KEYS}
        licence = _texts({key: said.get(name) for key, name in keys.items()})
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    named = [x for x in files if x.upper().startswith(_LICENCE_FILES)]
    name = hub_id or (whole.name if gguf is None else gguf.stem)
    return BaseModel(name, hub_id, licence, named[0] if named else None)


def _of_card(card: Path) -> dict[str, str]:
    """Return the licence in the front matter of a model card, empty if it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        found: Any = metadata_load(card)
    except Exception:  # the card is for people, and may hold anything
        return {}
    return _texts(found) if isinstance(found, dict) else {}


def _texts(found: dict[str, Any]) -> dict[str, str]:
    return {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}
