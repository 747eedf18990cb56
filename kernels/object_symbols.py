"""Symbols of the functions in an object file of kernels (object_file). Plain, no numba."""


def symbol_of(entry: str, words: int) -> str:
    """Symbol of an entry that takes so many words."""
    return f"vvupipe_{entry}_{words}"
