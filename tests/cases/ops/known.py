"""Ops about which the sweep is not content yet, and those that it has to leave out."""

# Rules that are wrong or raise; a test fails where one of these has become right.
KNOWN_WRONG: dict[str, str] = {}

# Sweeps of what cannot be held against numbers.
LEFT_OUT = {
    "empty": "memory that was not written to",
    "empty_like": "memory that was not written to",
    "empty_permuted": "memory that was not written to",
    "empty_strided": "memory that was not written to",
    "new_empty": "memory that was not written to",
    "new_empty_strided": "memory that was not written to",
    "linalg.ldl_solve": "pivots of other matrices make it write anywhere",
}

# Ops with a rule that PyTorch's table does not reach, and whose arguments follow from the schema.
OWN_ARGUMENTS: tuple[str, ...] = ()

# Ops that take any number for a mode, and read anywhere for one that there is not.
UNCHECKED = ("grid_sampler_2d", "grid_sampler_3d")
