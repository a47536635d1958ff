"""Documents as the tests read them: pages, their code blocks, and a shell program that runs a page's commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

from tests.helpers import PROJECT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STATUS_OF_LAST = re.compile(r"\b[Ee]xits with status (\d+)(?!:)")
STATUS_OF_NEXT = re.compile(r"\bexits with status (\d+):\s*\Z")
QUOTE = re.compile(r"# ([\w/]+\.(?:py|md))\n")
COMMENT = re.compile(r"^#.*\n|\s+# .*$", re.MULTILINE)

FEWEST_PAGES = 12  # the project has more

MARK = "@@ block"  # separates the outputs of two blocks


@dataclass(frozen=True)
class Block:
    """A fenced code block, the text before it and the text after it, each up to the next block or heading."""

    language: str
    text: str
    before: str
    after: str


@dataclass(frozen=True)
class Page:
    """A Markdown file, named by its path in the project."""

    name: str

    @cached_property
    def text(self) -> str:
        return (PROJECT / self.name).read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return FENCE.sub("", self.text)

    @cached_property
    def blocks(self) -> list[Block]:
        """All code blocks, in order."""
        # Text between blocks, language, code, text between blocks, ...
        parts = FENCE.split(self.text)
        return [
            Block(parts[n + 1], parts[n + 2], parts[n].split("\n#")[-1], parts[n + 3].split("\n#")[0])
            for n in range(0, len(parts) - 1, 3)
        ]

    def of(self, *languages: str) -> list[str]:
        """Return the texts of the code blocks in those languages."""
        return [block.text for block in self.blocks if block.language in languages]

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that a link to this page may have behind its `#`."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@dataclass(frozen=True)
class Step:
    """A block to run, its exit status according to the page, and the block that shows its output, if the page has one."""

    language: str
    text: str
    status: int
    shown: Block | None


def all_pages() -> list[Page]:
    """Return every Markdown file of the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    pages = [Page(name) for name in sorted(set(listed.stdout.split()))]
    assert len(pages) > FEWEST_PAGES, "most of the pages are not where the tests look for them"
    return pages


def section(document: str, heading: str) -> str:
    """Return the text under that heading of the second level."""
    return re.split(r"^## ", document.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def quotes_of(page: Page) -> list[tuple[str, str]]:
    """Return the quotations of a page, Python blocks that begin with a comment that names a file: the file and its lines."""
    return [(found[1], text[found.end() :]) for text in page.of("python") if (found := QUOTE.match(text))]


def steps_of(page: Page) -> list[Step]:
    """Return the blocks of shell and Python except quotations; a block that directly follows such a block is its output."""
    steps = []
    for block, following in zip_longest(page.blocks, page.blocks[1:]):
        if block.language in ("bash", "python") and not QUOTE.match(block.text):
            shown = following if following and not block.after.strip() and following.language in ("json", "text") else None
            said = STATUS_OF_NEXT.search(block.before) or STATUS_OF_LAST.search(shown.after if shown else block.after)
            steps.append(Step(block.language, block.text, int(said[1]) if said else 0, shown))
    return steps


def lines_of(command: str) -> list[str]:
    """Return the commands of a block, one a line, without comments."""
    return COMMENT.sub("", command.replace("\\\n", " ")).split("\n")[:-1]


def program(commands: Sequence[str]) -> str:
    """Return a shell program of the commands, each behind its mark; it ends at the first command that fails."""
    marked = [f"echo '{MARK} {number}' | tee /dev/stderr\n{command}" for number, command in enumerate(commands)]
    return "\n".join(["set -euo pipefail", *marked, f"echo '{MARK} end'", STOP_SERVERS])


def run(step: Step) -> str:
    """Return shell code that runs a step and fails if its status is another one."""
    text = step.text if step.language == "bash" else f"python - <<'END_OF_PYTHON'\n{step.text}END_OF_PYTHON\n"
    if step.status == 0:
        return text
    return f"set +e\n(set -e\n{text})\nstatus=$?\nset -e\n[ $status = {step.status} ]"


def only_parse(step: Step) -> str:
    """Return shell code that only asks each command for its help; an unknown option is an error nevertheless."""
    return "\n".join(f"{line} --help >/dev/null" for line in lines_of(step.text))


def serve(command: str, sign: str) -> str:
    """Return shell code that starts a command in the background and waits until its log has `sign`."""
    return (
        f'log=$(mktemp)\n(exec {command}) >$log 2>&1 &\nservers="$! ${{servers:-}}"\n'
        f"until grep -q '{sign}' $log; do kill -0 $! || {{ cat $log >&2; exit 1; }}; sleep 0.1; done"
    )


# The server that was started last ends first. `wait` returns its exit status, which must be 0.
STOP_SERVERS = "for server in ${servers:-}; do kill $server; wait $server; done"


def printed(stdout: str) -> list[str]:
    """Return the output of each command of a `program`."""
    return [part.split("\n", 1)[1] for part in stdout.split(MARK)[1:-1]]
