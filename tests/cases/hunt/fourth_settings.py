"""Settings that programs of the fourth hunt read, as a project keeps them in a file of their own."""

SCALE = 1.0
CALLS = 0
