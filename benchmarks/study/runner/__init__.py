"""Run studies from recipes (``safe-core study``) and report them (``safe-core report``).

A `Recipe` lists data, network, methods, sparsities and seeds. `run_study` trains every
combination in PyTorch or JAX, and `write_report` makes tables and figures of the results.

>>> from importlib.resources import files
>>> recipe = read_recipe(files("safe_core.study") / "recipes" / "table-4-digits.toml")
>>> recipe.sparsities
(0.9, 0.95, 0.98, 0.99)
"""

from .cells import Cell, cells
from .recipe import Recipe
from .recipe_files import installed_recipes, parse_recipe, read_recipe, recipe_source
from .report import write_report
from .run import FailedRunsError, planned_runs, run_study

__all__ = [
    "Cell",
    "FailedRunsError",
    "Recipe",
    "cells",
    "installed_recipes",
    "parse_recipe",
    "planned_runs",
    "read_recipe",
    "recipe_source",
    "run_study",
    "write_report",
]
