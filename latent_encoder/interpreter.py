"""The check of the Python that runs this: its age and its packages. An unfit one ends with its name and the next step.

`main.py` imports this module before every other one. Python 3.6 has to be able to run it, so it imports the standard library
only, and its annotations are those that Python 3.6 has.
"""

import json
import os
import platform
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

OLDEST_PYTHON = (3, 11)

START_PACKAGES = ("click", "cloup", "dotenv", "pydantic", "pydantic_settings", "structlog")
"""The modules that every mode imports, `--help` too."""

ENCODING_PACKAGES = (
    *("torch", "torchvision", "numpy", "PIL", "safetensors", "isal", "simplejpeg", "skimage"),
    *("loky", "packaging", "prometheus_client", "psutil", "tqdm"),
)
"""The modules that encoding needs too. ComfyUI's own are checked with its tree."""

PACKAGES_OF_MODES = {
    "standalone": ENCODING_PACKAGES,
    "kafka": (*ENCODING_PACKAGES, "confluent_kafka"),
    "dlq-replay": ("confluent_kafka", "prometheus_client"),
    "compare": ENCODING_PACKAGES,
    "inspect": ("torch", "numpy", "PIL", "safetensors", "jinja2"),
}
"""The modules that a mode needs at its start; the doctor examines without them."""

EXIT_SERVICE_FAILED = 3
"""The same status as in `exits.py`, which an old Python cannot import."""

PROJECT_DIR = Path(__file__).resolve().parent.parent
ENVIRONMENT = PROJECT_DIR / ".venv"


def refuse_unfit_python(arguments: "list[str]") -> None:
    """End the process if this Python is too old, or lacks a package that every mode needs.

    The doctor reports first as much as it can examine without them.
    """
    reason = unfitness(START_PACKAGES)
    if reason:
        end(reason, arguments)


def end(reason: str, arguments: "list[str]") -> NoReturn:
    """Report why the service cannot start with this Python, and the next step, and end the process."""
    if asks_doctor(arguments):
        sys.stdout.write(_report(reason, arguments))
        sys.stdout.flush()
    sys.stderr.write(f"Error: {reason}\n{next_step(arguments)}\n")
    sys.exit(EXIT_SERVICE_FAILED)


def unfitness(packages: "tuple[str, ...]") -> str:
    """Return why this Python cannot run the service, as a sentence; empty if it can."""
    if sys.version_info < OLDEST_PYTHON:
        return f"{this_python()} is too old; Python 3.11 or newer is needed."
    missing = missing_packages(packages)
    return f"{this_python()} lacks {', '.join(missing)}." if missing else ""


def missing_packages(packages: "tuple[str, ...]") -> "list[str]":
    """Return the modules that this Python does not find. Nothing is imported."""
    return [name for name in packages if name not in sys.modules and find_spec(name) is None]


def unimportable(exc: Exception, reason: str) -> str:
    """Return a sentence about an import that failed: the package and the reason."""
    return f"{this_python()} cannot import {package_of(exc) or 'its modules'}: {reason.rstrip('.')}."


def this_python() -> str:
    """Return the Python that runs this, with its version."""
    return f"{sys.executable or 'this Python'} (Python {platform.python_version()})"


def next_step(arguments: "list[str]") -> str:
    """Return the next step: setup, or the same command with the Python of the environment that setup has made."""
    setup = "Run ./setup_comfyui.sh" + ("" if _in_project() else f" in {PROJECT_DIR}")
    active = os.environ.get("VIRTUAL_ENV") or str(ENVIRONMENT)  # setup installs into an active environment
    if Path(active).resolve() == Path(sys.prefix).resolve():
        return f"{setup}, which installs the packages in this environment."
    python = ENVIRONMENT / "bin" / "python"
    command = " ".join(map(shlex.quote, [_shown(python), _shown(PROJECT_DIR / "main.py"), *arguments]))
    if os.access(str(python), os.X_OK):
        return f"Use the environment of this service: {command}"
    return f"{setup}, then: {command}"


def asks_doctor(arguments: "list[str]") -> bool:
    """Return whether a command line that is not parsed yet asks for the doctor."""
    return "doctor" in arguments or "--mode=doctor" in arguments or os.environ.get("MODE") == "doctor"


def _shown(path: Path) -> str:
    return str(path.relative_to(PROJECT_DIR) if _in_project() else path)


def _in_project() -> bool:
    try:
        return Path.cwd().resolve() == PROJECT_DIR
    except OSError:  # the working folder was removed
        return False


def package_of(exc: Exception) -> str:
    """Return the package whose import failed, the first that the service's own code asked for; empty if there is none."""
    place = exc.__traceback__
    while place is not None:
        name = str(place.tb_frame.f_globals.get("__name__"))
        file = place.tb_frame.f_code.co_filename
        if not file.startswith(("<frozen", f"{PROJECT_DIR}{os.sep}")) or "site-packages" in Path(file).parts:
            return name.partition(".")[0]
        place = place.tb_next
    return str(getattr(exc, "name", None) or "").partition(".")[0]


def _report(reason: str, arguments: "list[str]") -> str:
    """Return the doctor's report of everything that can be examined without packages."""
    step = next_step(arguments)
    fit = sys.version_info >= OLDEST_PYTHON
    missing = missing_packages(tuple(sorted({*START_PACKAGES, *ENCODING_PACKAGES, "confluent_kafka", "jinja2"})))
    tree = Path(os.environ.get("COMFYUI_PATH") or PROJECT_DIR / "comfyui").expanduser()
    absent = [name for name in ("nodes.py", "folder_paths.py", "comfy") if not (tree / name).exists()]
    checks = [
        ("Machine", "python", fit, this_python(), "Install Python 3.11 or newer and run ./setup_comfyui.sh."),
        ("Machine", "python packages", not missing, f"missing: {', '.join(missing)}" if missing else reason, step),
        ("Machine", "environment", ENVIRONMENT.is_dir(), str(ENVIRONMENT), "Run ./setup_comfyui.sh, which makes it."),
        ("ComfyUI", "comfyui", not absent, str(tree), "Run ./setup_comfyui.sh, or set COMFYUI_PATH to a ComfyUI checkout."),
    ]
    return _as_json(checks) if "--json" in arguments else _as_text(checks)


def _as_json(checks: "list[tuple[str, str, bool, str, str]]") -> str:
    listed = [
        {"group": group, "name": name, "state": "tick" if fine else "cross", "found": found, "advice": "" if fine else advice}
        for group, name, fine, found, advice in checks
    ]
    return json.dumps({"worst": "cross", "checks": listed}, indent=2) + "\n"


def _as_text(checks: "list[tuple[str, str, bool, str, str]]") -> str:
    lines = ["Findings"]
    lines += [f"  x {name}: {found}\n    {advice}" for _, name, fine, found, advice in checks if not fine]
    lines += ["Fine"] + [f"  + {name}: {found}" for _, name, fine, found, _ in checks if fine]
    lines += ["The other checks need the packages."]
    return "\n".join(lines) + "\n"
