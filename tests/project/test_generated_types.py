"""Types that common generators make of the schemas: TypeScript and Go that compile and tell the outcomes apart.

The generators come from npm, in the versions of `generators/package-lock.json`, into the folder of downloads that test runs
share. Without Node.js, npm's registry or Go, the tests that need them are skipped, and say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from jsonschema import Draft7Validator

from scripts.write_schemas import ASYNCAPI, FOLDER, REQUEST, RESPONSE
from tests.broker.cache import cache_folder
from tests.helpers import PROJECT

GENERATORS = PROJECT / "tests" / "project" / "generators"
NPM_TIMEOUT_S = 120  # an install takes 6 s; a registry that does not respond must not hold up the tests
GO_FOLDERS = ("/usr/local/go/bin",)  # Go's installer puts it there and leaves the PATH to the user

EXAMPLES: list[dict[str, Any]] = json.loads((FOLDER / RESPONSE).read_text(encoding="utf-8"))["examples"]


def program(name: str, folders: Sequence[str] = ()) -> str:
    """Return the path of a program, or skip the test."""
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} is not installed: the types generated from the schemas are not compiled")
    return found


def succeed(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def modules() -> Path:
    """Return the folder of the generators, which are installed once for all test runs."""
    program("node")
    npm, lock = program("npm"), (GENERATORS / "package-lock.json").read_bytes()
    folder = cache_folder() / f"generators-{hashlib.sha256(lock).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            folder.mkdir(exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(GENERATORS / name, folder)
            install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
            try:
                done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
                fault = done.stderr[-400:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                fault = f"no end after {NPM_TIMEOUT_S} s"
            if fault:
                pytest.skip(f"npm cannot install the generators, so the generated types are not compiled: {fault}")
            (folder / "complete").touch()
    return folder / "node_modules"


def typescript(modules: Path, folder: Path, consumer: str) -> subprocess.CompletedProcess[str]:
    """Generate the types of both schemas beside a consumer, and compile it."""
    for schema, name in ((REQUEST, "request"), (RESPONSE, "response")):
        types = succeed("node", modules / ".bin" / "json2ts", FOLDER / schema, cwd=folder)
        (folder / f"{name}.d.ts").write_text(types, encoding="utf-8")
    shutil.copy(GENERATORS / consumer, folder)
    options = ["--noEmit", "--strict", "--target", "es2022", "--module", "preserve", "--lib", "es2022,dom"]
    command = ["node", str(modules / "typescript" / "bin" / "tsc"), *options, consumer]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_typescript_tells_the_outcomes_apart(modules: Path, tmp_path: Path) -> None:
    """A consumer that looks at `status` first compiles with TypeScript's strict checks."""
    done = typescript(modules, tmp_path, "use.ts")
    assert done.returncode == 0, done.stdout


def test_typescript_refuses_a_path_without_a_look_at_the_status(modules: Path, tmp_path: Path) -> None:
    """A consumer that takes every response for a success does not compile."""
    done = typescript(modules, tmp_path, "use_wrong.ts")
    assert done.returncode != 0
    assert "Type 'null' is not assignable to type 'string'" in done.stdout


def test_go_reads_the_examples(modules: Path, tmp_path: Path) -> None:
    """The generated Go compiles, and reads the example responses."""
    go = program("go", GO_FOLDERS)
    quicktype = ["node", str(modules / ".bin" / "quicktype"), "--src-lang", "schema", "--lang", "go", "--package", "main"]
    command = [*quicktype, "--telemetry", "disable", "-o", "types.go"]
    succeed(*command, *(f"{FOLDER / RESPONSE}#/$defs/{name}" for name in ("SuccessMessage", "ErrorMessage")), cwd=tmp_path)
    shutil.copy(GENERATORS / "use.go", tmp_path)
    environment = {"GOCACHE": str(cache_folder() / "go"), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    (tmp_path / "go.mod").write_text("module example\n", encoding="utf-8")
    succeed(go, "build", "-o", "use", ".", cwd=tmp_path, env=environment)
    printed = succeed(tmp_path / "use", *map(json.dumps, EXAMPLES), cwd=tmp_path)
    success, failure = EXAMPLES
    metadata = success["metadata"]
    assert printed.splitlines() == [
        f"{success['latent_file_path']} 16 {metadata['latent_sha256']} {metadata['timestamp'][:4]}",
        f"{failure['error_code']} {failure['error_message']}",
    ]


def test_asyncapi_is_valid_by_its_own_schema(modules: Path) -> None:
    """The AsyncAPI document is valid by the schema that AsyncAPI publishes for its version."""
    specification = modules / "@asyncapi" / "specs" / "schemas" / "3.0.0.json"
    document = yaml.safe_load((FOLDER / ASYNCAPI).read_text(encoding="utf-8"))
    Draft7Validator(json.loads(specification.read_text(encoding="utf-8"))).validate(document)
