"""Settings of the whole process that several threads change at a time: ComfyUI's input folder and Pillow's tolerance."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import ImageFile

from latent_encoder.comfy_input import input_setting
from latent_encoder.images.pillow import tolerant_pillow
from service import LatentEncoder


def test_threads_share_a_folder_and_wait_for_another(encoder: LatentEncoder) -> None:
    """Each thread sees its own folder all the time, two threads are inside at once, and the former folder comes back."""
    paths = encoder.runtime._folder_paths
    setting = input_setting(paths)
    former = paths.get_input_directory()
    both = threading.Barrier(2, timeout=20)

    def use(folder: Path, *, together: bool) -> set[str]:
        with setting.entered(folder):
            if together:
                both.wait()
            return {paths.get_input_directory() for _ in range(200)}

    with ThreadPoolExecutor(8) as pool:
        shared = [pool.submit(use, Path("/a"), together=True) for _ in range(2)]
        assert [job.result() for job in shared] == [{"/a"}] * 2
        mixed = {folder: [pool.submit(use, Path(folder), together=False) for _ in range(20)] for folder in ("/a", "/b")}
        for folder, jobs in mixed.items():
            assert {seen for job in jobs for seen in job.result()} == {folder}
    assert paths.get_input_directory() == former


def test_tolerance_lasts_until_the_last_thread_ends() -> None:
    """A thread that ends first takes the tolerance from no other, and afterwards Pillow is as strict as before."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    inside, first_ended = threading.Barrier(2, timeout=20), threading.Event()

    def first() -> None:
        with tolerant_pillow():
            inside.wait()
        first_ended.set()

    def second() -> bool:
        with tolerant_pillow():
            inside.wait()
            assert first_ended.wait(20)
            return ImageFile.LOAD_TRUNCATED_IMAGES

    with ThreadPoolExecutor(2) as pool:
        jobs = pool.submit(first), pool.submit(second)
        jobs[0].result()
        assert jobs[1].result()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
