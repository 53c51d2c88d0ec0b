"""Memory that was freed, handed back to the system: else a conversion grows with the model.

torch takes aligned memory, and before release 2.38 glibc does not find that again once it is freed (its bug 14581), so
what a slab takes stays with the process: measured 20 MB for each expert matrix of Flash, of which there are 33 792.
"""

import ctypes


def give_back() -> None:
    """Return all that is free to the system; nothing where the C library has no `malloc_trim`, as only glibc has."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
