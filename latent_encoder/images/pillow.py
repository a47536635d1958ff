"""Pillow's settings for the whole process: its warnings, and its tolerance of damage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from PIL import ImageFile

from latent_encoder.shared_context import SharedContext


@contextmanager
def _silenced(_: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


@contextmanager
def _tolerant(_: None) -> Iterator[None]:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


_SILENCED, _TOLERANT = SharedContext(_silenced), SharedContext(_tolerant)


def quiet_pillow() -> AbstractContextManager[None]:
    """Silence Pillow's warnings about odd files: faults that matter are refused, changes are noted."""
    return _SILENCED.entered(None)


def tolerant_pillow() -> AbstractContextManager[None]:
    """Have Pillow read damaged files and metadata as far as it can, as LoadImage has it do.

    Other threads get this tolerance too. Their files were judged without Pillow, and whole ones are decoded alike.
    """
    return _TOLERANT.entered(None)
