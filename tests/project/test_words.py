"""The words of docstrings and comments: the beginnings of docstrings, and the frequency of "what"."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import FEWEST_FILES, OUR_FILES, PROJECT

BESIDE = sorted(
    file
    for folder in ("tests", "fuzz", "benchmarks", "scripts", "clients")
    for file in (PROJECT / folder).rglob("*.py")
    if not any(part.startswith(".") for part in file.relative_to(PROJECT).parts)  # another ComfyUI tree of the tests
)
"""The Python files beside the product."""

FEWEST_BESIDE = 90
"""There are more of them; a test that finds fewer looks in the wrong place."""

LED_BY = re.compile(r"(what|whether|where|those|as|of|that|which|who)\b", re.IGNORECASE)
"""Words that begin a docstring without a subject."""

MOST_WHATS = 2 / 1000
"""Largest share of the word among all words: plain technical English has 0 to 0.4 in a thousand."""


class Text(NamedTuple):
    """A docstring or a comment, and its place."""

    file: Path
    line: int
    text: str
    is_docstring: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}: {self.text[:60]}"

    def words(self) -> list[str]:
        """Return the words in lower case."""
        return re.findall(r"[a-z']+", self.text.lower())


def texts_in(file: Path, source: str) -> Iterator[Text]:
    """Yield the docstrings of a file, those of fields among them, and its comments."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield Text(file, node.lineno, text.strip(), is_docstring=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:)", token.string):
            yield Text(file, token.start[0], token.string.lstrip("# "), is_docstring=False)


def texts_of(files: Sequence[Path]) -> list[Text]:
    """Return the docstrings and comments of the project's files."""
    return [text for file in files for text in texts_in(file.relative_to(PROJECT), file.read_text(encoding="utf-8"))]


def badly_led(texts: Sequence[Text]) -> list[str]:
    """Return the places of the docstrings that begin with one of the words."""
    return [text.place for text in texts if text.is_docstring and LED_BY.match(text.text)]


def whats(texts: Sequence[Text]) -> list[str]:
    """Return a place for each occurrence of the word."""
    return [text.place for text in texts for word in text.words() if word == "what"]


def test_files_are_found() -> None:
    """The files of the product and those beside it are where this module looks for them."""
    assert len(OUR_FILES) > FEWEST_FILES
    assert len(BESIDE) > FEWEST_BESIDE


@pytest.mark.parametrize("files", [OUR_FILES, BESIDE], ids=["product", "beside"])
def test_docstrings_begin_with_a_verb_or_a_noun(files: Sequence[Path]) -> None:
    """No docstring begins with a relative pronoun, with `as` or with `of`."""
    found = badly_led(texts_of(files))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("files", [OUR_FILES, BESIDE], ids=["product", "beside"])
def test_what_is_rare(files: Sequence[Path]) -> None:
    """The word occurs at most twice in a thousand words of docstrings and comments."""
    texts = texts_of(files)
    found = whats(texts)
    assert len(found) <= MOST_WHATS * sum(len(text.words()) for text in texts), "\n".join(found)


SOURCE = '''"""What is found here."""
class Thing:
    size: int
    """Whether it is large."""
    def name(self) -> str:
        """Return what it is called."""
        return "what"  # what else
'''


def test_texts_are_found_with_their_lines() -> None:
    """Docstrings of modules, functions and fields and comments are read, other strings are not."""
    texts = list(texts_in(Path("thing.py"), SOURCE))
    assert badly_led(texts) == ["thing.py:1: What is found here.", "thing.py:4: Whether it is large."]
    assert whats(texts) == [
        "thing.py:1: What is found here.",
        "thing.py:6: Return what it is called.",
        "thing.py:7: what else",
    ]
