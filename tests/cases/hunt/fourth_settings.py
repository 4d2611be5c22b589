"""Settings that programs of the fourth hunt read, in a file of their own."""

SCALE = 1.0
CALLS = 0
