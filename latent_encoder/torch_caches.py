"""The size of the caches in which torch keeps operations that were prepared for one shape of image on a CPU."""

from __future__ import annotations

import os

CAPACITY = 256
"""Entries of each cache. The encode of one size makes about 50, so five sizes are kept. To make the entries of a size again
takes about 10 ms. These entries take about 13 MB if every image has another size; torch's own 1024 take about 50 MB.
"""

CACHES = (
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"),
    ("LRU_CACHE_CAPACITY",),
)
"""The environment variables of each cache, the first that is read first: oneDNN's compiled operations, and the descriptions of
operations that torch keeps beside them (https://github.com/intel/ideep), once for each thread.
"""


def limit_torch_caches() -> None:
    """Set the size of each cache, unless the environment has one. Worker processes inherit it.

    torch reads the sizes when it first needs a cache, so this comes before the first encode.
    """
    for variables in CACHES:
        if not any(variable in os.environ for variable in variables):
            os.environ[variables[0]] = str(CAPACITY)
