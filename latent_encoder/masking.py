"""The secrets that this process was given, and texts without them.

Every text for people goes through `masked`: log events, errors, reports. So a secret stays out of them even if a library puts
it into a message.
"""

from __future__ import annotations

import json
import re
from urllib.parse import quote

HIDDEN = "***"

SHORTEST_INSIDE_WORDS = 6
"""Characters. A shorter secret is masked as a whole word only: `kafka` would be cut out of the names of loggers and topics."""

SHORTEST_LINE = 8
"""Characters of a line that is masked by itself, because a log may indent the lines of a key. A shorter one reveals little."""

_QUERY_OF_URL = re.compile(r"(?<![A-Za-z0-9+.-])(https?://[^\s?#\"'<>]+)\?[^\s\"'<>)]*", re.IGNORECASE)
"""A query may be the signature of a presigned URL. It is cut off, because no text of ours needs one."""
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^\s/?#@\"']+@")  # `user:password@` in front of the host

_forms: set[str] = set()
_patterns: list[re.Pattern[str]] = [_CREDENTIALS_IN_URL]


def keep_secret(value: str) -> None:
    """Mask this value in every text from now on, also if it was quoted, escaped, or brought onto one line."""
    forms = {form for text in (value, *_long_lines(value)) for form in _forms_of(text)} - _forms - {""}
    if not forms:
        return
    _forms.update(forms)
    longest_first = sorted(_forms, key=len, reverse=True)  # a secret may be the beginning of another one
    _patterns[1:] = [re.compile("|".join(map(_as_pattern, longest_first)))]


def masked(text: str) -> str:
    """Return the text with stars in place of secrets and of the credentials in URLs, and without the queries of URLs."""
    if "?" in text:
        text = _QUERY_OF_URL.sub(r"\1", text)
    for pattern in tuple(_patterns):
        text = pattern.sub(HIDDEN + "@" if pattern is _CREDENTIALS_IN_URL else HIDDEN, text)
    return text


def _long_lines(value: str) -> list[str]:
    lines = [line.strip() for line in value.splitlines()]
    return [line for line in lines if len(line) >= SHORTEST_LINE]


def _forms_of(value: str) -> set[str]:
    quoted = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1], ascii(value)[1:-1]}
    return {value, value.strip(), " ".join(value.split()), quote(value, safe="", errors="replace"), *quoted}


def _as_pattern(form: str) -> str:
    pattern = re.escape(form)
    return pattern if len(form) >= SHORTEST_INSIDE_WORDS else rf"(?<!\w){pattern}(?!\w)"
