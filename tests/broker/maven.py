"""The jars of Apache Kafka and of other servers for the tests, from Maven Central."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from tests.broker.cache import cache_folder
from tests.broker.interface import BrokerError

POM = Path(__file__).with_name("pom.xml")
OLDEST_JAVA = 17


def java_and_maven_are_here() -> bool:
    """Return whether this machine can download and run Kafka, and other servers in Java."""
    return shutil.which("mvn") is not None and shutil.which("java") is not None and java_version() >= OLDEST_JAVA


def java_version() -> int:
    """Return the major version of the Java on the path; 1 if it is older than Java 9."""
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr
    version = re.search(r'version "(\d+)', told)
    if version is None:
        raise BrokerError(f"`java -version` prints no version: {told}")
    return int(version[1])


def kafka_version() -> str:
    """Return the version that pom.xml names."""
    version = re.search(r"<artifactId>kafka_2\.13</artifactId>\s*<version>(.+)</version>", POM.read_text())
    assert version
    return version[1]


def class_path(pom: Path = POM) -> str:
    """Return the class path of a list of jars and their dependencies. Maven resolves them once, and after a change."""
    checksum = hashlib.sha256(pom.read_bytes()).hexdigest()[:16]
    remembered = cache_folder() / f"{'kafka' if pom == POM else pom.parent.name}-{checksum}.classpath"
    with FileLock(f"{remembered}.lock"):
        if not remembered.is_file() or not all(Path(jar).is_file() for jar in remembered.read_text().split(os.pathsep)):
            resolve(remembered, pom)
        return remembered.read_text()


def resolve(target: Path, pom: Path = POM) -> None:
    """Download the jars into Maven's own cache and write their class path."""
    unfinished = target.with_suffix(".part")
    command = ["mvn", "-B", "-q", "-f", str(pom), "dependency:build-classpath", f"-Dmdep.outputFile={unfinished}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise BrokerError(f"Maven cannot resolve the jars of {pom}:\n{done.stdout}")
    unfinished.replace(target)
