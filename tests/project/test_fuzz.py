"""The fuzzing itself: a few dozen inputs, their reproduction, and the report of a fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fuzz.cases import SHARES, Corpus, make_case
from fuzz.corpus import make_corpus
from fuzz.process import Folders
from tests.helpers import PROJECT, clean_environment


def fuzz(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "fuzz",
        "--findings",
        folder / "findings",
        "--json",
        folder / "figures.json",
        *arguments,
    ]
    return subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, check=False)


def test_few_dozen_inputs_are_answered_as_they_should_be(tmp_path: Path) -> None:
    """48 inputs of all kinds give no finding, and the report counts each of them."""
    done = fuzz(tmp_path, "--inputs", "48", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48 inputs in" in done.stdout
    assert "findings: 0" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["by_kind"].keys() == SHARES.keys()
    assert sum(sum(counts.values()) for counts in figures["by_kind"].values()) == 48
    assert 0 < figures["limits"]["loaded"] < figures["largest"]["peak"] < figures["limits"]["memory"]
    assert not (tmp_path / "findings").exists()


def test_input_that_is_not_answered_in_time_is_a_finding(tmp_path: Path) -> None:
    """An input that exceeds its time is a finding: status 1, the input is kept with its command, and the next one runs."""
    # Pickles, because no service responds to them within 0.1 ms; a refused request may be that quick.
    done = fuzz(tmp_path, "--only", "12", "--only", "17", "--patience", "0.0001")
    assert done.returncode == 1
    assert "findings: 2" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [finding["faults"] for finding in figures["findings"]] == [["no response within 0.0001 s"]] * 2
    kept = {path.name for path in (tmp_path / "findings").iterdir()}
    assert len(kept) == 4
    (description,) = (tmp_path / "findings").glob("seed0-12.*.txt")
    assert "python -m fuzz --seed 0 --only 12" in description.read_text()


def test_input_can_be_made_again(tmp_path: Path) -> None:
    """The same corpus, seed and number give the same bytes, and another number or seed gives others."""
    folders = Folders(tmp_path)
    make_corpus(folders)
    corpus = Corpus.read(folders.corpus)
    cases = [make_case(corpus, 0, number) for number in range(200)]
    assert cases == [make_case(corpus, 0, number) for number in range(200)]
    assert len({case.data for case in cases}) > 150
    assert cases[0] != make_case(corpus, 1, 0)
