"""The settings: their sources, which source wins, and the two places that document them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from config import PROJECT_DIR, VARIABLES, VERSION, Settings, SettingsError, load_settings

SPECIFIED = (
    "MODE",
    "KAFKA_BOOTSTRAP_SERVERS",
    "KAFKA_REQUEST_TOPIC",
    "KAFKA_RESPONSE_TOPIC",
    "KAFKA_CONSUMER_GROUP",
    "MODEL_DIR",
    "VAE_MODEL_NAME",
    "OUTPUT_DIR",
    "COMFYUI_PATH",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "UPSCALE_METHOD",
    "MEGAPIXELS",
)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove `.env` and all variables except those that a test sets."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name.upper(), raising=False)


def test_every_specified_variable_is_a_setting() -> None:
    """Every variable of the specification is a setting of the same name."""
    assert {name.lower() for name in SPECIFIED} <= Settings.model_fields.keys()


def test_command_line_over_environment_over_file_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source wins over the next."""
    assert load_settings({}).megapixels == 1.0
    Path(".env").write_text("MEGAPIXELS=2  # a comment\nUNKNOWN=7\n")
    assert load_settings({}).megapixels == 2.0
    monkeypatch.setenv("MEGAPIXELS", "3")
    assert load_settings({}).megapixels == 3.0
    assert load_settings({"megapixels": 4.0, "mode": None}).megapixels == 4.0


def test_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MODEL_DIR=` in a file means the default, not the working folder."""
    monkeypatch.setenv("MODEL_DIR", "")
    assert load_settings({}).model_dir is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MODE", "batch"),
        ("MEGAPIXELS", "many"),
        ("MEGAPIXELS", "17"),
        ("UPSCALE_METHOD", "cubic"),
        ("VAE_MODEL_NAME", "../x"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("DEVICE", "tpu"),
        ("VAE_PRECISION", "fp8"),
        ("VAE_CACHE_SIZE", "0"),
        ("MAX_IMAGE_PIXELS", "-1"),
        ("MAX_IMAGE_BYTES", "0"),
        ("MAX_OUTPUT_MEGAPIXELS", "17"),
        ("ALLOWED_INPUT_DIRS", ","),
        ("ALLOWED_OUTPUT_DIRS", "~nobody-of-that-name/x"),
        ("KAFKA_REQUEST_TOPIC", "a topic"),
        ("KAFKA_PREFETCH", "0"),
        ("KAFKA_MAX_RETRIES", "-1"),
        ("KAFKA_RETRY_BACKOFF_S", "0"),
        ("KAFKA_CREATE_TOPICS", "perhaps"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("SHUTDOWN_TIMEOUT_S", "soon"),
    ],
)
def test_wrong_value_names_the_variable(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message begins with the variable and shows the value."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=rf"^{variable}: .*{re.escape(value)}"):
        load_settings({})


def test_lists_and_levels_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are separated by commas, and levels are in any case."""
    monkeypatch.setenv("CUSTOM_NODES", "one, two,")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    settings = load_settings({})
    assert (settings.custom_nodes, settings.log_level) == (("one", "two"), "DEBUG")


def test_allowed_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are made absolute, and `~` is a home; a setting that is not set is None, which means no limit."""
    assert load_settings({}).allowed_input_dirs is None
    monkeypatch.setenv("ALLOWED_INPUT_DIRS", "./images, ~/photos,/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert load_settings({}).allowed_input_dirs == (tmp_path / "images", Path("/home/me/photos"), Path("/data"))


@pytest.mark.parametrize("variable", ["ALLOWED_INPUT_DIRS", "ALLOWED_OUTPUT_DIRS"])
@pytest.mark.parametrize("source", ["environment", ".env"])
@pytest.mark.parametrize(
    "value",
    [
        *("", " ", ",", "null", "None", "nil", "undefined", "[]", "{}", '""', '[""]', "[null]", "[1]", "0", "false", "*"),
        *("/a,null", '["/a"', '"/a","/b"', '[["/a"]]', "[" * 50_000),
    ],
)
def test_limit_without_folders_is_refused(variable: str, source: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that names no folder, or something else, is a fault: it must not mean that every folder is allowed."""
    if source == "environment":
        monkeypatch.setenv(variable, value)
    else:
        Path(".env").write_text(f"{variable}='{value}'\n")
    with pytest.raises(SettingsError, match=rf"^{variable}: "):
        load_settings({})


@pytest.mark.parametrize("value", ["/a,/b", " /a , /b/ ,", '["/a", "/b"]', '"/a,/b"'])
def test_folders_are_a_list_or_a_json_array(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are separated by commas, or a JSON array; spaces around them and slashes at their ends change nothing."""
    monkeypatch.setenv("ALLOWED_INPUT_DIRS", value)
    assert load_settings({}).allowed_input_dirs == (Path("/a"), Path("/b"))


def test_empty_limit_in_the_environment_leaves_that_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is not set, so the folders of `.env` count."""
    Path(".env").write_text("ALLOWED_INPUT_DIRS=/data\n")
    monkeypatch.setenv("ALLOWED_INPUT_DIRS", "")
    assert load_settings({}).allowed_input_dirs == (Path("/data"),)


NUMBERS = [
    name for name, field in Settings.model_fields.items() if any(kind in str(field.annotation) for kind in ("int", "float"))
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["null", "none", "nan", "inf", "-inf", "1e400", "-1", " ", "[]", "true"])
def test_no_mistyped_number_turns_a_limit_off(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is none, negative or infinite is refused for each setting with a number."""
    monkeypatch.setenv(name.upper(), value)
    with pytest.raises(SettingsError, match=rf"^{name.upper()}: "):
        load_settings({})


def test_default_megapixels_are_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default size over the limit is refused, because every request without a size would be."""
    monkeypatch.setenv("MAX_OUTPUT_MEGAPIXELS", "0.5")
    with pytest.raises(SettingsError, match=r"^MEGAPIXELS: must be at most MAX_OUTPUT_MEGAPIXELS=0\.5 \(got 1\.0\)"):
        load_settings({})
    assert load_settings({"megapixels": 0.5}).max_output_megapixels == 0.5


@pytest.mark.parametrize("days", ["0", "-1", "inf", "nan", "soon", "40000"])
def test_time_to_keep_files_that_cannot_be_used(days: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero does not mean off, and a time beyond a century is a mistake: only a setting that is absent keeps files for ever."""
    assert load_settings({}).output_ttl_days is None
    monkeypatch.setenv("OUTPUT_TTL_DAYS", "0.5")
    assert load_settings({}).output_ttl_days == 0.5
    monkeypatch.setenv("OUTPUT_TTL_DAYS", days)
    with pytest.raises(SettingsError, match=r"^OUTPUT_TTL_DAYS: "):
        load_settings({})


def test_settings_are_frozen() -> None:
    """Settings cannot be changed once they are read."""
    with pytest.raises(ValidationError):
        load_settings({}).megapixels = 2.0  # type: ignore[misc]


def shown_default(field: FieldInfo) -> str:
    default: Any = field.default
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"./{default.relative_to(PROJECT_DIR)}" if isinstance(default, Path) else str(default)


def env_example() -> list[str]:
    """Return the headings and entries of .env.example."""
    return (PROJECT_DIR / ".env.example").read_text(encoding="utf-8").split("\n\n", 1)[1].strip().split("\n\n")


def test_env_example_lists_every_variable_with_its_default_and_meaning() -> None:
    """The file has every setting once, word for word."""
    expected = [f"# {field.description}\n#{name.upper()}={shown_default(field)}".rstrip() for name, field in VARIABLES.items()]
    assert sorted(entry for entry in env_example() if "\n" in entry) == sorted(expected)


def test_env_example_begins_with_the_most_important_settings() -> None:
    """The first group has five settings, and each setting stands below a heading."""
    headings = [number for number, entry in enumerate(env_example()) if "\n" not in entry]
    assert headings[:2] == [0, 6]
    assert env_example()[0] == "# ---- Set these five first ----"
    assert all(re.fullmatch(r"# ---- .+ ----", env_example()[number]) for number in headings)


def test_env_example_can_be_used_as_it_is(tmp_path: Path) -> None:
    """With every setting uncommented, a copy of the file gives the defaults."""
    text = re.sub(r"(?m)^#(?=[A-Z_]+=)", "", (PROJECT_DIR / ".env.example").read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^ALLOWED_.*\n", "", text)  # empty ones are refused, because they could mean no limit by mistake
    (tmp_path / ".env").write_text(text)
    assert load_settings({"comfyui_path": PROJECT_DIR / "comfyui"}) == Settings(_env_file=None)


def test_table_of_the_documentation_is_the_code() -> None:
    """The table has the variable, the default and the description of each setting."""
    expected = []
    for name, field in VARIABLES.items():
        default = f"`{shown_default(field)}`" if shown_default(field) else ""
        expected.append(f"| `{name.upper()}` | {default} | {field.description} |".replace("|  |", "| |"))
    page = (PROJECT_DIR / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if re.match(r"\| `[A-Z_]+` \|.*\|.*\|$", line)] == expected


def test_changelog_begins_with_this_version() -> None:
    """The version that `--version` prints is the newest one in the changelog."""
    changelog = (PROJECT_DIR / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert found is not None
    assert found[1] == VERSION
