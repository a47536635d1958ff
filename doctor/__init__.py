"""Doctor mode: what of the installation works, and what to do where it does not. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from config import Settings
from doctor import report
from doctor.check import Check, Installation, State, guarded

# What is examined: the name of the check that it becomes where that fails in itself, and the function. Each is imported when
# its turn comes, so that what cannot be imported is one more thing that was found.
GROUPS = {
    "Settings": {
        "setting": "doctor.settings.check_faults",
        "defaults": "doctor.settings.check_set",
        ".env": "doctor.settings.check_env_file",
    },
    "Machine": {
        "python": "doctor.machine.check_python",
        "memory": "doctor.machine.check_memory",
        "torch": "doctor.torch_and_device.check_torch",
        "device": "doctor.torch_and_device.check_device",
    },
    "ComfyUI": {
        "comfyui": "doctor.comfyui.check_tree",
        "packages": "doctor.comfyui.check_packages",
        "nodes": "doctor.comfyui.check_nodes",
    },
    "Models": {"vae file": "doctor.models.check_models", "model disk": "doctor.folders.check_model_disk"},
    "Folders": {
        "output folder": "doctor.folders.check_output_dir",
        "allowed folders": "doctor.folders.check_allowed_folders",
    },
    "Kafka mode": {"kafka broker": "doctor.network.check_kafka", "http port": "doctor.network.check_http_port"},
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
