"""The C library's heap: one for all threads, and freed memory that it would keep."""

from __future__ import annotations

import ctypes
import os

M_ARENA_MAX = -8
"""glibc's name of `mallopt` for the number of heaps."""

ARENA_MAX = "MALLOC_ARENA_MAX"
"""glibc's variable of the environment for the same."""


def share_one_heap() -> None:
    """Let all threads that are started later use one heap, unless the environment has another number.

    By default each thread gets a heap of its own, in pieces of 64 MB. The encode's thread left more holes in them: at one
    megapixel it kept 0.11 GB more.
    """
    if ARENA_MAX not in os.environ and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Let the C library return freed memory to the system, also that between pieces in use."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # only glibc has it
        trim(0)
