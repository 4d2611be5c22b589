"""Which versions of PyTorch the package has been tested with, and what is said of any other.

The version is found without importing torch, which takes seconds: `import unbatch` asks for it.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec

from unbatch.errors import warn

# Minor versions under which the tests pass; docs/reference/versions.md has the counts.
TESTED = ("2.13", "2.14", "2.15")

MSG_UNTESTED = (
    "unbatch has not been tested with PyTorch {version}, but with {tested}: what is new in an "
    "operation may be unknown to it. Install a tested version (pip install 'torch=={newest}.*'), "
    "or go on, and let problem.verify() try what you rely on; this warning is silenced, before "
    "the import, by warnings.filterwarnings('ignore', 'unbatch has not been tested')."
)

# A shell that completes words runs the command with this in the environment, and shows whatever it
# prints beside the words.
COMPLETION = "_UNBATCH_COMPLETE"


def warn_of_untested() -> None:
    """Warn where the installed PyTorch is of a minor version that is not in ``TESTED``."""
    version = installed()
    if version is None or minor(version) in TESTED or COMPLETION in os.environ:
        return
    message = MSG_UNTESTED.format(version=version, tested=", ".join(TESTED), newest=TESTED[-1])
    warn(message, UserWarning)


def minor(version: str) -> str:
    """Return ``"2.14"`` of ``"2.14.1+cu130"``."""
    return ".".join(version.split(".")[:2])


def installed() -> str | None:
    """Return the version of torch without importing it, or None where it is not to be found."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return getattr(torch, "__version__", None)
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return _written_in(os.path.join(os.path.dirname(spec.origin), "version.py"))


def _written_in(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = re.search(r"^__version__ = '([^']+)'", file.read(), re.MULTILINE)
    except OSError:
        return None
    return found and found[1]
