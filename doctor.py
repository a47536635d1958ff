"""Doctor mode: what of the installation works, and what to do where it does not. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import doctor_report as report
from config import Settings
from doctor_check import Check, Examine, Installation, State, guarded
from doctor_comfyui import check_nodes, check_tree
from doctor_machine import (
    check_allowed_folders,
    check_device,
    check_memory,
    check_model_disk,
    check_output_dir,
    check_python,
    check_torch,
)
from doctor_models import check_models
from doctor_network import check_http_port, check_kafka
from doctor_settings import check_env_file, check_faults, check_set

# What is examined, by the name of the check that it becomes where it fails in itself.
GROUPS: dict[str, dict[str, Examine]] = {
    "Settings": {"setting": check_faults, "defaults": check_set, ".env": check_env_file},
    "Machine": {"python": check_python, "torch": check_torch, "device": check_device, "memory": check_memory},
    "ComfyUI": {"comfyui": check_tree, "nodes": check_nodes},
    "Models": {"vae file": check_models, "model disk": check_model_disk},
    "Folders": {"output folder": check_output_dir, "allowed folders": check_allowed_folders},
    "Kafka mode": {"kafka broker": check_kafka, "http port": check_http_port},
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
        for name, examine in examinations.items():
            for check in guarded(name, examine, installation):
                groups[group].append(check)
                if not as_json:
                    echo(report.as_text(check))
    found = [check for checks in groups.values() for check in checks]
    echo(report.as_json(groups) if as_json else report.summary(found))
    return 1 if report.worst(found) is State.CROSS else 0
