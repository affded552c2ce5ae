"""Check what is installed: the whole package, and the packages of its extras."""

from importlib import import_module
from importlib.util import find_spec

__all__ = ["install_command", "require"]

# A clone keeps the parts of the package in several folders, which only an installation puts
# together. Python finds the clone's safe_core/ before an installed wheel if it is started there.
if find_spec("safe_core.backends") is None:
    raise ImportError(
        "the folder safe_core/ of a clone holds only a part of the package: "
        "start Python in another folder, or run `pip install -e .` in the clone"
    )


def install_command(*extras: str) -> str:
    """Return the command that installs extras of safe-core.

    Examples
    --------
    >>> print(install_command("torch", "study"))
    pip install -c constraints.txt -e ".[torch,study]" in a clone
    """
    return f'pip install -c constraints.txt -e ".[{",".join(extras)}]" in a clone'


def require(user: str, *packages: str, extra: str) -> None:
    """Import the packages that a module needs, or raise an error that names their extra.

    Parameters
    ----------
    user : str
        What needs the packages, such as ``__name__``.
    *packages : str
        Names to import.
    extra : str
        The extra of safe-core that installs them.

    Raises
    ------
    ModuleNotFoundError
        If a package is missing. Its ``name`` is that of the package.

    Examples
    --------
    >>> require("this example", "numpy", extra="dev")
    >>> require("this example", "no_such_package", extra="dev")
    Traceback (most recent call last):
    ModuleNotFoundError: this example needs no_such_package: pip install -c constraints.txt -e \
".[dev]" in a clone
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise  # the package is there, but broken
            message = f"{user} needs {package}: {install_command(extra)}"
            raise ModuleNotFoundError(message, name=package) from None
