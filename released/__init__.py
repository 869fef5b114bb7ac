"""Interface of the released BLIP package and of LAVIS, for code written against them.

Nothing else in the project uses this package. Modules that the released package has and this project has not
(`data.utils`, `transform.randaugment`, ...) re-export from here; modules that both have look a missing name up here.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

HOMES = {"utils": "released.utils", "data": "released.datasets"}  # of names that only the released module has


def find(module: str, name: str) -> Any:
    """Return a released name that `module` does not define itself.

    Raises:
        AttributeError: the released module has no such name either.
    """
    if not name.startswith("_"):
        home = import_module(HOMES.get(module, "released.networks"))
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def door(module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module, which finds the names that only the released module has."""
    return partial(find, module)
