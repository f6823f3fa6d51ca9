"""The scripts of a recipe as modules."""

import sys
from importlib import import_module
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def import_recipe(folder):
    """Import the scripts of a recipe and forget their names: other recipes use the same ones."""
    names = [path.stem for path in (RECIPES / folder).glob("*.py")]
    paths = [str(RECIPES / folder), str(RECIPES)]
    for name in names:
        sys.modules.pop(name, None)
    before = list(sys.path)
    sys.path[:0] = paths
    try:
        return {name: import_module(name) for name in names}
    finally:
        sys.path[:] = before
        for name in names:
            sys.modules.pop(name, None)
