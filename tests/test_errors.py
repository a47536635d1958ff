"""Errors: one class for each code, and the translation of foreign exceptions."""

from __future__ import annotations

import pytest

from errors import ErrorCode, InvalidRequest, RequestError, one_line, translated


def error_classes(base: type[RequestError] = RequestError) -> list[type[RequestError]]:
    return [*base.__subclasses__()]


def test_every_code_has_one_class() -> None:
    """The hierarchy is closed: a class for each code and a code for each class."""
    assert sorted(error.code for error in error_classes()) == sorted(ErrorCode)


def test_only_faults_that_may_pass_are_retryable() -> None:
    """A full disk or a failed encode may go well next time; a bad request never does."""
    retryable = {error.code for error in error_classes() if error.retryable}
    assert retryable == {ErrorCode.OUTPUT_DIR_NOT_WRITABLE, ErrorCode.ENCODING_FAILED, ErrorCode.IMAGE_UNREACHABLE}


@pytest.mark.parametrize(
    "fault", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
@pytest.mark.parametrize("error", error_classes())
def test_lack_of_memory_is_never_the_requests_fault(error: type[RequestError], fault: Exception) -> None:
    """In every step, lack of memory is ENCODING_FAILED, which may be retried."""
    with pytest.raises(RequestError) as caught, translated(error, "Step"):
        raise fault
    assert caught.value.code == ErrorCode.ENCODING_FAILED
    assert "memory ran out" in str(caught.value)


def test_foreign_exception_becomes_one_line() -> None:
    """A message of many lines, or of none, is one line for the user, and the cause is kept."""
    with pytest.raises(InvalidRequest, match=r"^Step: a b$") as caught, translated(InvalidRequest, "Step"):
        raise ForeignError("a\n\n  b\n")
    assert isinstance(caught.value.__cause__, ForeignError)
    with pytest.raises(InvalidRequest, match=r"^Step: StopIteration$"), translated(InvalidRequest, "Step"):
        raise StopIteration


@pytest.mark.parametrize("error", error_classes())
def test_text_of_an_error_is_utf8(error: type[RequestError]) -> None:
    r"""A byte of a file name that is not UTF-8 is written `\xff`, any other lone surrogate `\ud800`."""
    assert str(error("caf\udce9 \ud800 é \U0001f600")) == "caf\\xe9 \\ud800 é \U0001f600"


def test_text_of_a_foreign_exception_is_utf8_or_its_class() -> None:
    """An exception whose text cannot be made has the name of its class."""
    assert one_line(OSError("a\udcff")) == "a\\xff"
    assert one_line(Unprintable()) == "Unprintable"


class Unprintable(Exception):
    """An exception that fails when it is printed."""

    def __str__(self) -> str:
        raise ValueError


class ForeignError(Exception):
    """Stands for any exception of a library."""
