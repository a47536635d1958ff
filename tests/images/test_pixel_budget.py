"""The memory of images that are loaded at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from latent_encoder.images.pixel_budget import PixelBudget
from tests.kafka_tools import wait_until


def test_images_share_the_pixels_of_the_largest() -> None:
    """Images together never have more pixels than the budget, and one that is larger than it gets all."""
    budget, lock = PixelBudget(10), threading.Lock()
    loaded, most = 0, 0

    def load(pixels: int) -> None:
        nonlocal loaded, most
        with budget.share(pixels):
            with lock:
                loaded += min(pixels, 10)
                most = max(most, loaded)
            with lock:
                loaded -= min(pixels, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, [1, 9, 4, 10, 25, 3, 7, 2] * 50))
    assert loaded == 0
    assert most == 10


def test_small_images_do_not_pass_a_large_one_for_ever() -> None:
    """An image that waits for room is the next to get it, though smaller ones that came later would fit."""
    budget, order = PixelBudget(10), list[str]()

    def load(name: str, pixels: int) -> None:
        with budget.share(pixels):
            order.append(name)

    with ThreadPoolExecutor(2) as pool:
        with budget.share(5):
            large = pool.submit(load, "large", 10)
            wait_until(lambda: len(budget._waiting) == 1, "the large image waits")
            small = pool.submit(load, "small", 1)
            wait_until(lambda: len(budget._waiting) == 2, "the small image waits behind it")
        large.result(20)
        small.result(20)
    assert order == ["large", "small"]
