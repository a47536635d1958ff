"""The input folder of ComfyUI, with several threads at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latent_encoder.comfy_input import InputSetting

FORMER = "/former"


class FolderPaths:
    """The part of ComfyUI's `folder_paths` that holds the input folder."""

    def __init__(self) -> None:
        self.folder = FORMER

    def get_input_directory(self) -> str:
        return self.folder

    def set_input_directory(self, folder: str) -> None:
        self.folder = folder


def test_threads_share_a_folder_and_wait_for_another() -> None:
    """Each thread sees its own folder all the time, two threads are inside at once, and the former folder comes back."""
    paths = FolderPaths()
    setting = InputSetting(paths)
    both = threading.Barrier(2, timeout=20)

    def use(folder: Path, *, together: bool) -> set[str]:
        with setting.being(folder):
            if together:
                both.wait()
            return {paths.folder for _ in range(200)}

    with ThreadPoolExecutor(8) as pool:
        shared = [pool.submit(use, Path("/a"), together=True) for _ in range(2)]
        assert [job.result() for job in shared] == [{"/a"}] * 2
        mixed = {folder: [pool.submit(use, Path(folder), together=False) for _ in range(20)] for folder in ("/a", "/b")}
        for folder, jobs in mixed.items():
            assert {seen for job in jobs for seen in job.result()} == {folder}
    assert paths.folder == FORMER
