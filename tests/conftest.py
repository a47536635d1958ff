"""What the tests share: one encoder on the real ComfyUI runtime, real VAEs of every family, and real image files."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from config import Settings
from latent_encoder.telemetry.logs import StderrHandler
from service import LatentEncoder
from tests.broker import Broker, choose
from tests.helpers import (
    COMFYUI,
    PROCESS_SETTINGS,
    PROJECT,
    TINY_VAE,
    VAE,
    Encode,
    RunMain,
    clean_environment,
    request_for,
    stock,
)
from tests.kafka_tools import Bench, Events
from tests.trees import CORE, CORE_ONLY, FACTS, TREE, is_wanted, skip_what_holds_for_the_pinned_release

# No deadlines on a shared machine, and a first run that fills Hypothesis' tables is slow; CI tries the same inputs each time.
hypothesis_settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis_settings.load_profile("project")


# The tests start a hundred processes: what one of them compiles, the others need not.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random VAEs of the real architectures: SD-style KL, a TAESD pair, full-size Wan 2.1.

    pytest-xdist's processes make them once, in the folder that their temporary folders are in, and link them into their own.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "random-vaes"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            stock("make-vaes", made, "kl", "taesd", "wan")
    return Path(shutil.copytree(made, base / "models", copy_function=os.link))


@pytest.fixture(scope="session", autouse=True)
def vae_of_processes(request: pytest.FixtureRequest) -> None:
    """Let processes find the VAE that stands in for the tiny one, on a tree that cannot load that."""
    if VAE != TINY_VAE:
        PROCESS_SETTINGS["MODEL_DIR"] = str(request.getfixturevalue("model_dir"))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What the command line configures when it runs in this process ends with the test."""
    root = logging.getLogger()
    level = root.level
    yield
    logging.captureWarnings(capture=False)
    root.setLevel(level)
    for handler in root.handlers[:]:
        if isinstance(handler, StderrHandler):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def settings(model_dir: Path) -> Settings:
    """The defaults, with what suits the tests."""
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]
    return Settings(
        _env_file=None, comfyui_path=COMFYUI, model_dir=model_dir, vae_model_name=VAE, megapixels=0.02, device="cpu"
    )


@pytest.fixture(scope="session")
def encoder(settings: Settings) -> LatentEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ComfyUI and its dependencies warn of while they are imported is not ours
        return LatentEncoder.set_up(settings)


@pytest.fixture
def encode(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """Encode one image into `tmp_path`; what is not given has the defaults of `settings`. Raises as the service does."""

    def encode(image: str | Path, **fields: Any) -> Any:
        return encoder.encode(request_for(settings, tmp_path, image, fields))

    return encode


@pytest.fixture
def answer(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """As `encode`, but every outcome is a response."""

    def answer(image: str | Path, **fields: Any) -> Any:
        return encoder.respond(request_for(settings, tmp_path, image, fields))

    return answer


@pytest.fixture
def run_main(tmp_path: Path) -> RunMain:
    """Run the command line as a process, in an empty folder, with an environment that has no settings of its own."""

    def run_main(*arguments: str | Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Any:
        command = [*prefix, sys.executable, PROJECT / "main.py", *arguments]
        environment = {**clean_environment(), **(env or {})}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_main


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-apache-kafka", action="store_true", help="Fail instead of testing with a broker that is not Apache Kafka."
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-apache-kafka") and not choose().is_apache_kafka:
        raise pytest.UsageError("No Apache Kafka can be had here: it takes a Docker engine, or Java 17 and Maven.")
    if missing := [name for name in CORE if not (PROJECT / "tests" / name).is_file()]:
        raise pytest.UsageError(f"Tests of the core are missing: {', '.join(missing)}.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the tests for the tree that TEST_COMFYUI_TREE names."""
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]
    for item in items:
        skip_what_holds_for_the_pinned_release(item)


def pytest_report_header() -> list[str]:
    """Which ComfyUI and which broker the tests run with."""
    return [f"ComfyUI {FACTS.version}, {TREE}{', core tests only' * CORE_ONLY}", f"Kafka broker: {choose().name}"]


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """A broker that this session started, or was given."""
    with choose()() as broker:
        yield broker


@pytest.fixture
def make_bench(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Topics of the test's own; `create=False` leaves creating them to the test."""
    benches: list[Bench] = []

    def make_bench(partitions: int = 1, *, create: bool = True, servers: str = broker.bootstrap_servers) -> Bench:
        bench = Bench(servers, tmp_path, partitions)
        benches.append(bench)
        if create:
            bench.create()
        return bench

    yield make_bench
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """Topics of the test's own, with one partition."""
    return make_bench()


@pytest.fixture
def apache_kafka(broker: Broker) -> None:
    """For tests of what only Apache Kafka has."""
    if not broker.is_apache_kafka:
        pytest.skip(f"{broker.name} has no transactions, no limits of a topic's own, and no quick rebalances")


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    """What a worker in this process logs."""
    caplog.set_level("INFO")
    return Events(caplog)
