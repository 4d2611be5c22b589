"""unbatch: proves which structure a loss has, and computes what that structure allows.

The names are those of `public.py`, which is imported when the first of them is asked for: torch
takes seconds to import, and `unbatch --help`, `--version` and completion in a shell do without it.
"""

import random
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from unbatch.running.interrupts import Held
from unbatch.versions import warn_of_untested

__version__ = "0.1.0"

RENAMED = {"Norms": "SquaredNorms"}  # names of before, which go on working

warn_of_untested()

if TYPE_CHECKING:
    from unbatch import integrations as integrations
    from unbatch import plot as plot
    from unbatch import spectra as spectra
    from unbatch.public import *  # noqa: F403
    from unbatch.public import __all__ as __all__
else:  # a type checker takes a module that has `__getattr__` to have every attribute

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # what Python itself looks for is no reason to import torch
        if find_spec(f"{__name__}.{name}"):
            return _imported(name)
        public = _imported("public")
        name = RENAMED.get(name, name)
        if name not in ("__all__", *public.__all__):
            here = sys.modules[__name__]
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}", name=name, obj=here
            )
        globals()[name] = getattr(public, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_imported("public").__all__})

    def _imported(name: str) -> Any:
        state = random.getstate()
        try:
            with Held(sealed=True):  # half an import would be there for ever
                return import_module(f"{__name__}.{name}")
        finally:
            random.setstate(state)  # rich draws a number when it is imported
