"""Refuse to import the folder of a clone as if it were the installed package."""

from importlib.util import find_spec

# A clone keeps the parts of the package in several folders, which only an installation puts
# together. Python finds the clone's safe_core/ before an installed wheel if it is started there.
if find_spec("safe_core.backends") is None:
    raise ImportError(
        "the folder safe_core/ of a clone holds only a part of the package: "
        "start Python in another folder, or run `pip install -e .` in the clone"
    )
