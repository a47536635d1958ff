"""The count of threads that torch uses for an encode."""

from __future__ import annotations

import torch

from latent_encoder.cpus import usable_cpus


def encode_threads() -> int:
    """Return the count of threads for an encode: torch's own choice, at most the CPUs that the container may use."""
    return min(torch.get_num_threads(), usable_cpus())


def set_torch_threads(count: int) -> None:
    """Set how many threads torch uses for operations of the calling thread."""
    torch.get_num_threads()  # initialises the thread's own value; a later initialisation would overwrite the new one
    torch.set_num_threads(count)
