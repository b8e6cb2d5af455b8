"""Memory of a process that makes maps of the same sizes over and over."""

import ctypes


def keep_freed_memory() -> None:
    """Have glibc reuse freed maps: on small maps, new pages from the system cost more than the arithmetic."""
    _set(trim=2**30, mmap=2**25)                                      # the largest that glibc takes


def return_freed_memory() -> None:
    """Have glibc give maps from 1 MiB on back to the system: else the holes between them are a good part of a process."""
    _set(trim=2**25, mmap=2**20)


def _set(trim: int, mmap: int) -> None:
    """Thresholds in bytes: of free memory at the heap's end, and of what never lies on the heap."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, trim)                                             # M_TRIM_THRESHOLD
        mallopt(-3, mmap)                                             # M_MMAP_THRESHOLD
