"""Write the bill of materials of an environment to standard output; called by supply_chain.sh, with its tools' Python.

    .tools/bin/python scripts/sbom.py ENVIRONMENT

cyclonedx-py finds the packages. This script adds the parts that are no packages: the service, ComfyUI's runtime, the tiny VAE.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from latent_encoder.installer.checksums import sha256, wrong_files
from latent_encoder.installer.satisfied import requirements
from latent_encoder.installer.sources import RELEASES, origin, version_of
from latent_encoder.releases import PINNED_RELEASE

COMFYUI = PROJECT / "comfyui"
TINY_VAE = PROJECT / "tiny_vae" / "tiny_qwen_vae.safetensors"
LISTS = ("requirements.txt", "requirements/comfyui.txt", "requirements/torch.txt")

Document = dict[str, Any]


def main() -> None:
    environment = Path(sys.argv[1])
    if not (environment / "bin" / "python").exists():
        sys.exit(f"Error: {environment} is not a virtual environment; run ./setup_comfyui.sh, or name another.")
    if origin(COMFYUI) is None:
        sys.exit(f"Error: {COMFYUI} is not filled; run ./setup_comfyui.sh.")
    bom = packages_in(environment)
    complete(bom)
    text = json.dumps(bom, indent=2)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"Error: the bill of materials is not valid CycloneDX 1.6: {error}")
    print(text)


def packages_in(environment: Path) -> Document:
    """Return cyclonedx-py's bill of the packages in an environment."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--spec-version", "1.6", "--output-format", "JSON"]
    made = subprocess.run([*command, str(environment)], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    bom: Document = json.loads(made.stdout)
    return bom


def complete(bom: Document) -> None:
    """Add the service with its direct dependencies, and its parts that are not packages."""
    parts = [comfyui(), tiny_vae()]
    direct = {name for file in LISTS for name in requirements(PROJECT / file)}
    refs = [part["bom-ref"] for part in bom["components"] if re.sub(r"[-_.]+", "-", part["name"]).lower() in direct]
    bom["metadata"]["component"] = service()
    bom["components"] += parts
    bom["dependencies"] += [{"ref": part["bom-ref"]} for part in parts]
    bom["dependencies"] += [{"ref": "latent-encoder", "dependsOn": [*refs, *(part["bom-ref"] for part in parts)]}]


def service() -> Document:
    """Return the service itself; its version is read from the file, because the tools' environment cannot import it."""
    (version,) = re.findall(r'^VERSION = "(.+)"$', (PROJECT / "config.py").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "type": "application",
        "bom-ref": "latent-encoder",
        "name": "latent-encoder",
        "version": version,
        "licenses": licence("MIT"),
    }


def comfyui() -> Document:
    """Return ComfyUI's runtime: the pinned release with its commit if it is that, else only the version that it states."""
    pinned = RELEASES[PINNED_RELEASE]
    source = origin(COMFYUI)
    assert source is not None
    component: Document = {
        "type": "framework",
        "bom-ref": "comfyui",
        "name": "ComfyUI",
        "version": version_of(COMFYUI) or "unknown",
        "licenses": licence("GPL-3.0"),
    }
    if wrong_files(COMFYUI, pinned.checksums):
        return component | {"description": f"Not the pinned release: filled from {source}."}
    return component | {
        "description": f"Runtime files, filled from {source.source}; the Python files have the pinned release's checksums.",
        "purl": f"pkg:github/comfyanonymous/comfyui@{pinned.commit}",
        "externalReferences": [{"type": "vcs", "url": pinned.upstream, "comment": f"commit {pinned.commit}"}],
    }


def tiny_vae() -> Document:
    return {
        "type": "machine-learning-model",
        "bom-ref": TINY_VAE.name,
        "name": TINY_VAE.name,
        "description": "For trying and testing; trained by tiny_vae/train_tiny_vae.py.",
        "hashes": [{"alg": "SHA-256", "content": sha256(TINY_VAE)}],
        "licenses": licence("MIT"),
    }


def licence(identifier: str) -> list[Document]:
    return [{"license": {"id": identifier, "acknowledgement": "declared"}}]


if __name__ == "__main__":
    main()
