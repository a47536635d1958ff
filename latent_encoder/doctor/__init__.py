"""Doctor mode: what of the installation works, and what to do where it does not. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from config import Settings
from latent_encoder.doctor import report
from latent_encoder.doctor.check import Check, Installation, State, guarded

# What is examined: the name of the check that it becomes where that fails in itself, and the function. Each is imported when
# its turn comes, so that what cannot be imported is one more thing that was found.
GROUPS = {
    "Settings": {
        "setting": "latent_encoder.doctor.settings.check_faults",
        "defaults": "latent_encoder.doctor.settings.check_set",
        ".env": "latent_encoder.doctor.settings.check_env_file",
    },
    "Machine": {
        "python": "latent_encoder.doctor.machine.check_python",
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
    "Kafka mode": {
        "kafka broker": "latent_encoder.doctor.network.check_kafka",
        "http port": "latent_encoder.doctor.network.check_http_port",
    },
}


def run(
    settings: Settings,
    origins: Mapping[str, str],
    *,
    faults: Sequence[str] = (),
    as_json: bool,
    echo: Callable[[str], None],
) -> int:
    """Examine the installation and tell what was found; the exit status: 1 where there is a cross, else 0.

    `faults` are the settings that cannot be used, which `settings` has the defaults of. Text is told check by check.
    """
    installation = Installation(settings, origins, faults)
    groups: dict[str, list[Check]] = {}
    for group, examinations in GROUPS.items():
        groups[group] = []
        if not as_json:
            echo(report.heading(group))
        for name, place in examinations.items():
            for check in guarded(name, place, installation):
                groups[group].append(check)
                if not as_json:
                    echo(report.as_text(check))
    found = [check for checks in groups.values() for check in checks]
    echo(report.as_json(groups) if as_json else report.summary(found))
    return 1 if report.worst(found) is State.CROSS else 0
