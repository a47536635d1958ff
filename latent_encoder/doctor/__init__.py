"""Doctor mode: checks of the installation, with advice for each fault. It changes nothing.

The exception is a hidden object in each output folder of a bucket, which shows that files can be written, and is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from latent_encoder.doctor.check import Check, Installation, State, guarded
from latent_encoder.doctor.report import worst

GROUPS = {
    "Settings": {
        "setting": "latent_encoder.doctor.settings.check_faults",
        "defaults": "latent_encoder.doctor.settings.check_set",
        ".env": "latent_encoder.doctor.settings.check_env_file",
    },
    "Machine": {
        "python": "latent_encoder.doctor.python.check_python",
        "memory": "latent_encoder.doctor.machine.check_memory",
        "torch": "latent_encoder.doctor.torch_and_device.check_torch",
        "device": "latent_encoder.doctor.torch_and_device.check_device",
    },
    "ComfyUI": {
        "comfyui": "latent_encoder.doctor.comfyui.check_tree",
        "packages": "latent_encoder.doctor.comfyui.check_packages",
        "nodes": "latent_encoder.doctor.comfyui.check_nodes",
    },
    "Models": {
        "vae file": "latent_encoder.doctor.models.check_models",
        "model disk": "latent_encoder.doctor.folders.check_model_disk",
    },
    "Folders": {
        "output folder": "latent_encoder.doctor.folders.check_output_dir",
        "allowed folders": "latent_encoder.doctor.folders.check_allowed_folders",
    },
    "Object storage": {
        "object storage": "latent_encoder.doctor.storage.check_storage",
    },
    "Kafka mode": {
        "kafka broker": "latent_encoder.doctor.network.check_kafka",
        "http port": "latent_encoder.doctor.network.check_http_port",
    },
}
"""The functions that examine, by group. Each key is the name of the check that reports an error of the function itself.

A function's module is imported when its turn comes, so that a module that cannot be imported becomes a check too.
"""


def examine(installation: Installation, progress: Callable[[str], None]) -> dict[str, list[Check]]:
    """Examine the installation, and return the checks by group. `progress` gets each group before it is examined."""
    groups: dict[str, list[Check]] = {}
    for group, examinations in GROUPS.items():
        progress(f"Examining: {group} …")
        groups[group] = [check for name, place in examinations.items() for check in guarded(name, place, installation)]
    progress("")
    return groups


def exit_status(groups: Mapping[str, Sequence[Check]]) -> int:
    """Return 1 if there is a cross, else 0."""
    return 1 if worst([check for checks in groups.values() for check in checks]) is State.CROSS else 0
