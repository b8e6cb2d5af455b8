"""Memory of a process that makes maps of the same sizes over and over."""

import ctypes


def keep_freed_memory() -> None:
    """Have glibc reuse freed maps: on small maps, new pages from the system cost more than the arithmetic."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, 2**30)                                            # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)                                            # M_MMAP_THRESHOLD, the largest that glibc takes
