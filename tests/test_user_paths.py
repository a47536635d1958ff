"""`~` at the beginning of paths: in settings, in secrets' files, and in every option that takes a path."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from pydantic import SecretStr

from config import VARIABLES, Settings, SettingsError, load_settings
from latent_encoder.cli.parsing import FilePath
from latent_encoder.requests import parse_request, read_fields
from latent_encoder.user_paths import expanded, expanded_file
from main import main
from tests.helpers import IMAGES, PROJECT, TINY_VAE, RunMain

USER = pwd.getpwuid(os.getuid())
PATH_SETTINGS = [name for name, field in Settings.model_fields.items() if "Path" in str(field.annotation)] + ["output_dir"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty home folder and an empty working folder, without settings around."""
    for name in VARIABLES:
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "HOME"),
        ("~/", "HOME/"),
        ("~/a b/~/c", "HOME/a b/~/c"),
        (f"~{USER.pw_name}/x", f"{USER.pw_dir.rstrip('/')}/x"),
        ("./~/x", "./~/x"),
        ("/data/~", "/data/~"),
        ("a~", "a~"),
        ("", ""),
    ],
)
def test_home_folder_is_meant_at_the_beginning_alone(path: str, expected: str, home: Path) -> None:
    """`~` and `~name` are home folders at the beginning of a path, and characters elsewhere."""
    assert expanded(path) == expected.replace("HOME", str(home))


def test_home_of_the_account_counts_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HOME, or with an empty one, the home folder is the account's; a relative one is refused."""
    for value in (None, ""):
        monkeypatch.delenv("HOME") if value is None else monkeypatch.setenv("HOME", value)
        assert expanded("~/x") == f"{USER.pw_dir.rstrip('/')}/x"
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(ValueError, match="no absolute path"):
        expanded("~/x")
    monkeypatch.setenv("HOME", "/")
    assert (expanded("~"), expanded("~/x")) == ("/", "/x")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without an account")
def test_user_without_a_home_is_a_settings_error() -> None:
    """A user id without an account, and no HOME: the error names the variable."""
    script = "import os; from config import load_settings; os.setuid(54321); load_settings({})"
    environment = {"OUTPUT_DIR": "~/x", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "SettingsError: OUTPUT_DIR: ~ cannot be expanded: HOME is not set" in done.stderr


@pytest.mark.parametrize("name", PATH_SETTINGS)
@pytest.mark.parametrize("source", ["environment", ".env"])
def test_every_setting_of_a_path_expands_it(name: str, source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting of a path has the home folder in place of `~`, without the spaces around; an unknown user is a fault."""

    def give(value: str) -> None:
        if source == "environment":
            monkeypatch.setenv(name.upper(), value)
        else:
            Path(".env").write_text(f'{name.upper()}="{value}"\n')

    give(" ~/x ")
    value = getattr(load_settings({}), name)
    assert value in (home / "x", str(home / "x"), (home / "x",))
    give("~no-such-user/x")
    with pytest.raises(SettingsError, match=rf"^{name.upper()}: ~ cannot be expanded: no user has the name after ~"):
        load_settings({})
    give("  ")
    with pytest.raises(SettingsError, match=rf"^{name.upper()}: must "):
        load_settings({})


def test_relative_paths_and_slashes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is relative to the working folder at its use, and a slash at the end changes nothing."""
    monkeypatch.setenv("OUTPUT_DIR", "out/")
    monkeypatch.setenv("MODEL_DIR", "models/")
    assert (load_settings({}).output_dir, load_settings({}).model_dir) == ("out/", Path("models"))


def test_file_of_a_secret_may_be_in_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`…_FILE` variables expand `~`; with an unknown user the fault shows nothing that may be the secret itself."""
    (home / "secret").write_text("hunter2\n")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD_FILE", "~/secret")
    assert load_settings({}).kafka_sasl_password == SecretStr("hunter2")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD_FILE", "~hunter2")
    with pytest.raises(SettingsError, match=r"^KAFKA_SASL_PASSWORD_FILE: .*no user has the name") as caught:
        load_settings({})
    assert "hunter2" not in str(caught.value)


def test_every_option_of_a_path_expands_it(home: Path) -> None:
    """Each option that shows a file or a folder in its help takes `~`."""
    paths = [param for param in main.params if param.metavar in ("DIR", "FILE", "PATH...", "[PATH]...")]
    assert len(paths) == 7
    assert all(isinstance(param.type, FilePath) for param in paths)
    assert FilePath().convert("~/x", None, None) == f"{home}/x"


def test_name_that_begins_with_a_tilde_is_a_file_if_it_exists() -> None:
    """A file whose name begins with `~`, as a shell's pattern finds it, is that file; without it, the user is unknown."""
    with pytest.raises(ValueError, match="no user has the name"):
        expanded_file("~$letter.png")
    with pytest.raises(click.BadParameter, match="no user has the name"):
        FilePath().convert("~$letter.png", None, None)
    Path("~$letter.png").touch()
    assert expanded_file("~$letter.png") == "~$letter.png"


def test_request_is_not_expanded() -> None:
    """A request as Kafka mode reads it keeps its `~`; only the default that a setting gives is a home folder."""
    request = parse_request(
        read_fields(b'{"image_path": "~/a.png", "output_dir": "~/out"}'), load_settings({}).request_defaults
    )
    assert (request.image_path, request.output_dir) == ("~/a.png", "~/out")


def test_run_reads_and_writes_in_the_home_folder(tmp_path: Path, run_main: RunMain, home: Path) -> None:
    """Options and patterns with `~` lead into the home folder, and no folder is made that is called `~`."""
    shutil.copy(IMAGES / "photo.jpg", home)
    (home / "list.jsonl").write_text(json.dumps({"image_path": "~/photo.jpg", "output_dir": "~/listed"}))
    common = ("--vae_model_name", TINY_VAE, "--megapixels", "0.02")
    done = run_main("--image_path=~/*.jpg", "--output_dir=~/out", *common, env={"HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["latent_file_path"]).parent == home / "out"
    done = run_main("--input-list=~/list.jsonl", *common, env={"HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["latent_file_path"]).parent == home / "listed"
    assert not (tmp_path / "~").exists()
    done = run_main("--image_path", home / "photo.jpg", "--output_dir=~no-such-user/x", *common)
    assert done.returncode == 2
    assert "'--output-dir' / '-o': '~no-such-user/x': ~ cannot be expanded" in done.stderr
