"""Write the settings into .env.example and into the table of docs/configuration.md.

    python scripts/write_settings.py

Names, defaults and meanings are those of config.py. The words around them stand in the two files and stay as they are.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from config import PROJECT_DIR, VARIABLES

ENV_EXAMPLE = PROJECT / ".env.example"
PAGE = PROJECT / "docs" / "configuration.md"

TABLE = re.compile(r"(?<=\|---\|---\|---\|\n)(\| `[A-Z_]+` \|.*\n)+")


def main() -> None:
    header, _, _ = ENV_EXAMPLE.read_text(encoding="utf-8").partition("\n\n")
    ENV_EXAMPLE.write_text("\n\n".join((header, *map(env_entry, VARIABLES.items()))) + "\n", encoding="utf-8")
    table = "".join(map(table_row, VARIABLES.items()))
    page, tables = TABLE.subn(lambda _: table, PAGE.read_text(encoding="utf-8"))
    assert tables == 1, f"{PAGE} has {tables} tables of settings"
    PAGE.write_text(page, encoding="utf-8")
    print(f"{len(VARIABLES)} variables written to {ENV_EXAMPLE.name} and {PAGE.relative_to(PROJECT)}")


def env_entry(setting: tuple[str, FieldInfo]) -> str:
    """Return a setting's comment and its assignment, which is commented out."""
    name, field = setting
    return f"# {field.description}\n#{name.upper()}={shown_default(field)}"


def table_row(setting: tuple[str, FieldInfo]) -> str:
    """Return a setting's row in the table: variable, default and meaning."""
    name, field = setting
    default = f" `{shown_default(field)}` " if shown_default(field) else " "
    return f"| `{name.upper()}` |{default}| {field.description} |\n"


def shown_default(field: FieldInfo) -> str:
    """Return the default as `.env` has it; empty if there is none. Paths in the project are relative to it."""
    default = field.default
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"./{default.relative_to(PROJECT_DIR)}" if isinstance(default, Path) else str(default)


if __name__ == "__main__":
    main()
