"""Refuse to import the folder of a clone as if it were the installed package."""

from importlib.util import find_spec

# A clone keeps the parts of the package in several folders, which only an installation puts
# together. Python finds the clone's safe_core/ before an installed wheel if it is started there.
if find_spec("safe_core.backends") is None:
    raise ImportError(
        "safe_core/ of a clone is not the whole package: run `pip install -e .` in the clone, "
        "or start Python in another folder"
    )
