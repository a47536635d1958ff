"""Text in the columns of a terminal: its width, cutting it, and breaking it into lines."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_encoder.columns import padded, shortened, width, wrapped

ODD = st.text(st.sampled_from("a bä目\u0301\u200d👩\ufe0f❤　"), max_size=30)


@pytest.mark.parametrize(
    ("text", "columns"), [("abc", 3), ("", 0), ("ä", 1), ("a\u0308", 1), ("目", 2), ("👩", 2), ("❤\ufe0f", 2), ("\u200d", 0)]
)
def test_width(text: str, columns: int) -> None:
    """A wide character has two columns, a combining mark none, an emoji mark one."""
    assert width(text) == columns


@pytest.mark.parametrize(
    ("columns", "end", "result"),
    [
        (20, None, "latent_photo_1234.pt"),
        (11, None, "laten…34.pt"),
        (16, 3, "latent_photo….pt"),
        (4, 3, "….pt"),
        (3, 3, "…pt"),
        (1, 3, "…"),
        (0, 3, ""),
        (5, 0, "late…"),
    ],
)
def test_shortened_text_keeps_beginning_and_end(columns: int, end: int | None, result: str) -> None:
    assert shortened("latent_photo_1234.pt", columns, "…", end=end) == result


def test_marks_stay_with_their_character() -> None:
    """No part begins with a combining mark that lost its character."""
    name = "e\u0301" * 10
    assert shortened(name, 5, "…") == "e\u0301e\u0301…e\u0301e\u0301"


@given(ODD, st.integers(-1, 30), st.sampled_from(["…", "..."]), st.none() | st.integers(0, 9))
def test_shortened_text_fits(text: str, columns: int, dots: str, end: int | None) -> None:
    """It is never wider than asked, and unchanged if it fits."""
    short = shortened(text, columns, dots, end=end)
    assert width(short) <= max(columns, 0)
    assert width(text) > columns or short == text


@given(ODD, st.integers(2, 12))
def test_wrapped_lines_fit(text: str, columns: int) -> None:
    """No line is too wide, and no character is lost but the spaces between words."""
    lines = list(wrapped(text, columns))
    assert all(width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_no_room_at_all_ends() -> None:
    """A column less than a character needs neither loops nor loses it."""
    assert list(wrapped("目 目", 1)) == ["目", "目"]


def test_padded_text_is_aligned_by_columns() -> None:
    assert [width(padded(name, 6)) for name in ("a", "目目", unicodedata.normalize("NFD", "éé"), "1234567")] == [6, 6, 6, 7]
