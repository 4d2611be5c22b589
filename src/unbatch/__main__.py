"""`python -m unbatch` is the command `unbatch`."""

from __future__ import annotations

from unbatch.cli.commands import main

if __name__ == "__main__":
    main()
