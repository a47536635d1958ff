"""The parts of this process's memory, so that a growing one can be told from the others (Linux with glibc only)."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from latent_encoder.process_memory import KIB

LIBC = ctypes.CDLL(None)

CODE = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ ..x. \S+ \S+ 0 *(?!\[)\n(?:\w+: .*\n)*?Size: +(\d+) kB\n(?:\w+: .*\n)*?Rss: +(\d+) kB$",
    re.MULTILINE,
)
"""An executable mapping of no file in `/proc/self/smaps`, with its size and its resident part."""


class Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, all of it in bytes or counts, over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


LIBC.mallinfo2.restype = Mallinfo2
LIBC.fopen.restype = ctypes.c_void_p
LIBC.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
LIBC.fclose.argtypes = (ctypes.c_void_p,)


@dataclass(frozen=True)
class Parts:
    """The parts of the memory of this process, in bytes, and counts that explain them."""

    resident: int
    anonymous: int
    """Resident and of no file: the part that a leak makes grow."""
    of_files: int
    """Resident pages of files and of shared memory, which the system may drop."""
    in_use: int
    """Memory that the C library has handed out and not got back, small blocks and mapped ones."""
    held: int
    """Freed memory that the C library has not given back to the system, resident or not."""
    arenas: int
    code_mapped: int
    """Machine code made while running: executable mappings of no file."""
    code: int
    """The resident part of those mappings."""
    python_blocks: int
    python_objects: int
    threads: int


def parts() -> Parts:
    """Return the parts of this process's memory now.

    Nothing may be in flight: `gc.get_objects` shows unfinished tuples, and the thread that makes one then fails.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = {name: int(kilobytes) * KIB for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", status)}
    malloc, code = LIBC.mallinfo2(), _code_made()
    return Parts(
        resident=resident["VmRSS"],
        anonymous=resident["RssAnon"],
        of_files=resident["RssFile"] + resident["RssShmem"],
        in_use=malloc.uordblks + malloc.hblkhd,
        held=malloc.fordblks,
        arenas=_arenas(),
        code_mapped=code[0],
        code=code[1],
        python_blocks=sys.getallocatedblocks(),
        python_objects=len(gc.get_objects()),
        threads=threading.active_count(),
    )


def _code_made() -> tuple[int, int]:
    """Return the bytes of all executable mappings of no file, and the resident ones of them."""
    found = CODE.findall(Path("/proc/self/smaps").read_text(encoding="utf-8"))
    return sum(int(size) for size, _ in found) * KIB, sum(int(resident) for _, resident in found) * KIB


def _arenas() -> int:
    """Return the number of heaps that the C library has made, one for each few threads."""
    with tempfile.NamedTemporaryFile() as file:
        stream = LIBC.fopen(file.name.encode(), b"w")
        LIBC.malloc_info(0, stream)
        LIBC.fclose(stream)
        return file.read().count(b"<heap nr=")
