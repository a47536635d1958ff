"""Doctor mode: what of the installation works, and what to do where it does not. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import doctor_report as report
from config import Settings
from doctor_check import Check, Installation, State, guarded

# What is examined: the name of the check that it becomes where that fails in itself, and the function. Each is imported when
# its turn comes, so that what cannot be imported is one more thing that was found.
GROUPS = {
    "Settings": {
        "setting": "doctor_settings.check_faults",
        "defaults": "doctor_settings.check_set",
        ".env": "doctor_settings.check_env_file",
    },
    "Machine": {
        "python": "doctor_machine.check_python",
        "memory": "doctor_machine.check_memory",
        "torch": "doctor_torch.check_torch",
        "device": "doctor_torch.check_device",
    },
    "ComfyUI": {"comfyui": "doctor_comfyui.check_tree", "nodes": "doctor_comfyui.check_nodes"},
    "Models": {"vae file": "doctor_models.check_models", "model disk": "doctor_folders.check_model_disk"},
    "Folders": {
        "output folder": "doctor_folders.check_output_dir",
        "allowed folders": "doctor_folders.check_allowed_folders",
    },
    "Kafka mode": {"kafka broker": "doctor_network.check_kafka", "http port": "doctor_network.check_http_port"},
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
