"""`python -m unbatch` is the command `unbatch`."""

from unbatch.cli import main

if __name__ == "__main__":
    main()
