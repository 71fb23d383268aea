"""Memory that stays with the process, so that a step does not fetch it from the system anew.

XLA on a CPU takes the memory of a step from ``malloc`` and frees it afterwards. glibc hands pieces
of more than 32 MB back to the system, and the next step touches every page of them for the first
time again: for a frozen model as for an adapted one, a seventh to a fifth of all processor time
(``python -m benchmarks.profiled --no-keep-freed``). Set before a process starts, these variables
do the same as ``keep_freed``:

    MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_TOP_PAD_=268435456
"""

import ctypes

# Numbers of glibc's malloc.h, each with what it is set to.
OPTIONS = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 256 * 2**20),
}


def keep_freed() -> bool:
    """Has malloc keep what is freed, for all frameworks in this process; before JAX starts.

    Returns:
      Whether it will; another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) == 1 for option in OPTIONS.values())
