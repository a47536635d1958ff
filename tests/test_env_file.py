"""The file `.env`: lines that can be read, lines that cannot, and variables in its values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from config import VARIABLES, SettingsError, env_file, load_settings, usable_settings
from latent_encoder.setting_names import repeated_variables, unknown_variables
from tests.helpers import IMAGES, RunMain

SECRET = "hunter2"  # noqa: S105  # it is looked for in messages


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (*VARIABLES, "unset"):
        monkeypatch.delenv(name.upper(), raising=False)


def write(text: str | bytes) -> None:
    Path(".env").write_bytes(text if isinstance(text, bytes) else text.encode())


def fault_of(text: str | bytes) -> str:
    write(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("OUTPUT_DIR=a", "a"),
        ("export OUTPUT_DIR=a", "a"),
        ("  OUTPUT_DIR = a  ", "a"),
        ("output_dir=a", "a"),
        ("OUTPUT_DIR=a # comment", "a"),
        ("OUTPUT_DIR=a#b", "a#b"),
        ("OUTPUT_DIR='a # b' # comment", "a # b"),
        ('OUTPUT_DIR="a b"', "a b"),
        ("OUTPUT_DIR=a b", "a b"),
        ("OUTPUT_DIR=a=b", "a=b"),
        ("OUTPUT_DIR=$UNSET", "$UNSET"),
        ("OUTPUT_DIR=", "./output"),
        ("OUTPUT_DIR=''", "./output"),
        ("OUTPUT_DIR= # comment", "./output"),
        ("# OUTPUT_DIR=a", "./output"),
        ("\ufeffOUTPUT_DIR=a", "a"),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_lines_are_read_as_a_shell_reads_them(line: str, value: str, end: str) -> None:
    """Quotes, comments, `export`, spaces, a byte order mark and any line end are understood; an empty value is not set."""
    write(f"{line}{end}MEGAPIXELS=2{end}" if end else line)
    settings = load_settings({})
    assert (settings.output_dir, settings.megapixels) == (value, 2.0 if end else 1.0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"KAFKA_SASL_PASSWORD {SECRET}", "is not NAME=value"),
        (f'KAFKA_SASL_PASSWORD="{SECRET}', "is not NAME=value, or has a quote without its second one"),
        (f"KAFKA_SASL_PASSWORD='{SECRET}'{SECRET}", "is not NAME=value"),
        (f"={SECRET}", "is not NAME=value"),
        (SECRET, "has no ="),
        ("export MEGAPIXELS", "has no ="),
        ("[settings]", "has no ="),
        (f"MEGAPIXELS: {SECRET}", "is not NAME=value"),
        (f"MEGAPIXELS:={SECRET}", "has a name that no variable can have"),
        (f'"MEGAPIXELS"={SECRET}', "has a name that no variable can have"),
        (f"KAFKA_SASL_PASSWORD='{SECRET}\nDEVICE=cpu\nLOG_LEVEL=INFO'", "has a quoted value of 3 lines"),
        (f"OTHERS='{SECRET}\nDEVICE=cpu\nMORE='", "has a quoted value of 3 lines; is its second quote missing?"),
        (f"KAFKA_SASL_PASSWORD={SECRET}${{UNSET}}", "KAFKA_SASL_PASSWORD: the variable in ${…} is not set"),
        (f'OUTPUT_DIR="${{UNSET}}/{SECRET}"', "OUTPUT_DIR: the variable in ${…} is not set"),
        (f"OUTPUT_DIR=${{UNSET:?{SECRET}}}", "OUTPUT_DIR: only ${NAME} and ${NAME:-default} are expanded"),
        (f"OUTPUT_DIR=${{UNSET:-${{{SECRET}}}}}", "OUTPUT_DIR: only ${NAME}"),
        (f"OUTPUT_DIR=${{{SECRET}", "OUTPUT_DIR: only ${NAME}"),
        (f'OUTPUT_DIR="\\${{HOME}}/{SECRET}"', "OUTPUT_DIR: only ${NAME}"),
    ],
)
def test_line_that_cannot_be_used_is_named_without_its_content(line: str, reason: str) -> None:
    """The fault has the file, the number of the line and the reason; nothing of a line that may hold a secret."""
    fault = fault_of(f"# first\n\n\n{line}\n")
    assert fault.startswith(f".env: line 4: {reason}")
    assert SECRET not in fault


def test_fault_is_status_2_in_every_mode(tmp_path: Path, run_main: RunMain) -> None:
    """A line that cannot be read ends standalone and Kafka mode with status 2; the doctor shows it and goes on."""
    (tmp_path / ".env").write_text(f"MEGAPIXELS 0.5\nALLOWED_INPUT_DIRS=/data\nA={SECRET}\n")
    for arguments in (("--image_path", str(IMAGES / "photo.jpg")), ("--mode", "kafka"), ("--mode", "inspect", "x")):
        done = run_main(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "A setting cannot be used. .env: line 1: is not NAME=value" in done.stderr
    settings, faults = usable_settings({})
    assert settings.allowed_input_dirs == (Path("/data"),)
    assert len(faults) == 1


def test_only_the_first_faults_are_shown() -> None:
    """A file of another kind gives three faults and the count of the others."""
    fault = fault_of("some\nother\nkind\nof\nfile\n")
    assert fault.count(" has no =") == 3
    assert fault.endswith(".env: 2 more lines cannot be used")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("MEGAPIXELS=2\nOUTPUT_DIR=\udcff\n".encode("utf-8", "surrogateescape"), "not UTF-8 in line 2"),
        ("MEGAPIXELS=2\n".encode("utf-16"), "not UTF-8 in line 1"),
        ("MEGAPIXELS=2\n".encode("utf-16-le"), "it has NUL characters"),
        (b"A=1\n" * 20_000, "larger than 65536 bytes"),
    ],
)
def test_file_that_is_no_text_is_a_fault(content: bytes, reason: str) -> None:
    """A file in another encoding, or a huge one, is a fault."""
    assert fault_of(content).startswith(f".env: cannot be read ({reason}")


def test_place_of_the_file_that_holds_none_is_a_fault() -> None:
    """A folder, a pipe and a broken link are faults; a virtual environment and `/dev/null` are no file."""
    place = Path(".env")
    place.mkdir()
    with pytest.raises(SettingsError, match=r"^\.env: cannot be read \(Is a directory\)"):
        load_settings({})
    (place / "pyvenv.cfg").touch()
    assert load_settings({}).megapixels == 1.0
    (place / "pyvenv.cfg").unlink()
    place.rmdir()
    os.mkfifo(place)
    with pytest.raises(SettingsError, match=r"^\.env: cannot be read \(not a regular file\)"):
        load_settings({})
    place.unlink()
    place.symlink_to("none")
    with pytest.raises(SettingsError, match=r"^\.env: cannot be read \(No such file or directory\)"):
        load_settings({})
    place.unlink()
    place.symlink_to(os.devnull)
    assert load_settings({}).megapixels == 1.0


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("OUTPUT_DIR=${BASE}/x", "/base/x"),
        ('OUTPUT_DIR="${BASE}/x"', "/base/x"),
        ("OUTPUT_DIR='${BASE}/x'", "${BASE}/x"),
        ("OUTPUT_DIR='${BASE'", "${BASE"),
        ("OUTPUT_DIR=${UNSET:-/default}/x", "/default/x"),
        ("OUTPUT_DIR=${EMPTY:-/default}/x", "/default/x"),
        ("OUTPUT_DIR=${EMPTY}x", "x"),
        ("OUTPUT_DIR=${BASE:-/default}/x", "/base/x"),
        ("BASE=/file\nOUTPUT_DIR=${BASE}/x", "/file/x"),
        ("OUTPUT_DIR=${BASE}/x\nBASE=/later", "/base/x"),
        ("OTHER='${BASE}'\nOUTPUT_DIR=${OTHER}", "${BASE}"),
    ],
)
def test_variables_are_expanded_except_in_single_quotes(line: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` is the value of an earlier line, else of the environment; a default counts for an unset or empty one."""
    monkeypatch.setenv("BASE", "/base")
    monkeypatch.setenv("EMPTY", "")
    write(line)
    assert load_settings({}).output_dir == value


def test_lines_of_other_programs_do_no_harm() -> None:
    """Other programs' variables may refer to unset ones, and may have several lines."""
    write('OTHER=${UNSET}${x:?y}\nKEY="-----BEGIN\nabc=\n-----END"\nspring.url=x\nMEGAPIXELS=2\n')
    assert load_settings({}).megapixels == 2.0
    assert env_file().variables["key"] == "-----BEGIN\nabc=\n-----END"


def test_setting_that_is_set_twice_is_named_with_its_lines() -> None:
    """The last line counts; the warning names the setting, in any case of its letters, and the lines."""
    write("MEGAPIXELS=2\nOTHER=1\nmegapixels=3\nOTHER=2\n")
    assert load_settings({}).megapixels == 3.0
    assert repeated_variables() == ["MEGAPIXELS (lines 1, 3)"]


def test_misspelt_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting with a letter too few is named, in `.env` and in the environment, also in its first word."""
    for name in ("OUPUT_DIR", "ALLOWED_INPUT_DIR", "MEGAPIXEL"):
        write(f"{name}=1\n")
        assert [str(variable).split(" ")[0] for variable in unknown_variables()] == [name]
        write("")
        monkeypatch.setenv(name, "1")
        assert [str(variable).split(" ")[0] for variable in unknown_variables()] == [name]
        monkeypatch.delenv(name)


def test_run_warns_of_misspelt_and_repeated_names(tmp_path: Path, run_main: RunMain) -> None:
    """Standalone mode warns of both before it encodes."""
    (tmp_path / ".env").write_text("OUPUT_DIR=x\nMEGAPIXELS=1\nMEGAPIXELS=0.02\nCOMFYUI_PATH=none\n")
    done = run_main("--image_path", "x.png")
    assert '"variables": ["OUPUT_DIR (.env), did you mean OUTPUT_DIR?"]' in done.stderr
    assert '"variables": ["MEGAPIXELS (lines 2, 3)"]' in done.stderr
