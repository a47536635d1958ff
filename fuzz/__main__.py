"""Damaged images, VAE files and requests for the real service: `python -m fuzz`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from tqdm import tqdm

from config import Settings
from fuzz.cases import Case, Corpus, make_case
from fuzz.corpus import make_corpus
from fuzz.process import Folders, Result
from fuzz.report import figures, report
from fuzz.watch import Watched

MAX_IMAGE_PIXELS = 4_000_000  # small, so that the memory limit of an image is small, too


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--inputs", type=click.IntRange(min=1), default=10_000, show_default=True, metavar="N", help="Number of inputs.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Stop after this time, whatever is left."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed gives the same inputs.")
@click.option(
    "--only", type=int, multiple=True, metavar="N", help="Only the input of this number; may be given several times."
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="S",
    help="An input that takes longer counts as hanging.",
)
@click.option(
    "--findings",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fuzz-findings"),
    show_default=True,
    metavar="DIR",
    help="Folder for inputs with a wrong outcome.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures there too.")
def main(  # noqa: PLR0913  # click hands over each option
    *,
    inputs: int,
    seconds: float | None,
    seed: int,
    only: Sequence[int],
    patience: float,
    findings: Path,
    json_file: Path | None,
) -> None:
    """Give the service damaged JPEG, PNG, safetensors and pickle files and JSON requests, and check each outcome.



    Each input must end in a success whose files are whole, or in an error response with a code that is documented for the kind
    of damage: no unexpected error, no traceback, no warning, no leftover file, no crash, no hang, and no more memory than the
    limits allow. The service runs in a process of its own, which is started again after an input that ends it.

    Exit status: 0 all outcomes are as expected, 1 some are not, 2 wrong usage.

    \b
    Examples:
      python -m fuzz --inputs 500
      python -m fuzz --seed 0 --only 1234
    """  # noqa: D301  # click needs the character that \b stands for
    started = time.monotonic()
    numbers = list(only) or list(range(inputs))
    with tempfile.TemporaryDirectory(prefix="latent-encoder-fuzz-") as name:
        folders = Folders(Path(name).resolve())
        make_corpus(folders)
        settings = Settings(
            _env_file=None,
            model_dir=folders.models,
            output_dir="out",
            device="cpu",
            megapixels=0.01,
            max_image_pixels=MAX_IMAGE_PIXELS,
            torch_num_threads=1,
            vae_cache_size=3,  # two sound ones, and the damaged one
        )
        corpus = Corpus.read(folders.corpus)
        results = []
        with Watched(folders, settings, seed, patience) as watched:
            for number in progress(numbers, seconds):
                result = watched.result(number)
                results.append(result)
                if result.faults:
                    keep(findings, make_case(corpus, seed, number), result, seed)
            limits = watched.limits
    took = time.monotonic() - started
    click.echo(report(results, limits, seed, took))
    if json_file is not None:
        json_file.write_text(json.dumps(figures(results, limits, seed, took), indent=2) + "\n")
    sys.exit(1 if any(result.faults for result in results) else 0)


def progress(numbers: Sequence[int], seconds: float | None) -> Iterator[int]:
    """Yield the numbers until the time is over, with a progress bar on standard error."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for number in tqdm(numbers, unit="input", file=sys.stderr, disable=None, mininterval=1):
        if deadline is not None and time.monotonic() > deadline:
            return
        yield number


def keep(folder: Path, case: Case, result: Result, seed: int) -> None:
    """Write a failing input, and beside it its faults and the command that runs it again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed{seed}-{case.number}{case.suffix}"
    with path.open("wb") as file:
        file.write(case.data)
        file.truncate(len(case.data) + case.hole)
    faults = "\n".join(result.faults)
    again = f"python -m fuzz --seed {seed} --only {case.number}"
    path.with_name(f"{path.name}.txt").write_text(f"{case.mutation}\n{dict(case.fields)}\n{again}\n\n{faults}\n")


if __name__ == "__main__":
    main()
