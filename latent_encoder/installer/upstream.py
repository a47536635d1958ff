"""The tree of one commit of a git repository, fetched in bounded time and without questions to the user.

Only the standard library is needed. The repository is a URL, of which the one commit is fetched, or a git folder on this
machine, whose objects are read in place. Such a folder may be a partial mirror, which lacks some files.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROBE_SECONDS = 20
"""Timeout of short git commands. On a network that drops packets, git itself would wait for minutes."""
FETCH_SECONDS = 900
"""Timeout of a fetch: ComfyUI's 60 MB at 70 KB/s."""

STALLED_BYTES_PER_SECOND = 1000
STALLED_SECONDS = 30
"""Git ends a transfer that stays slower than this for this time: 60 MB would take more than 16 hours."""

OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")
"""Variables of the user's environment that would make git work on another repository than the named one."""

PLAIN = {"GIT_NO_LAZY_FETCH": "1", "GIT_LFS_SKIP_SMUDGE": "1", "GIT_DEFAULT_HASH": "sha1", "LC_ALL": "C"}
"""Settings for git: no fetching of single objects, no large-file storage, SHA-1 repositories, messages in English."""

REFERENCE = re.compile(r"[A-Za-z0-9][\w.+/-]*", re.ASCII)
SHORTEST_COMMIT = 7
COMMIT_DIGITS = 40


class GitError(Exception):
    """A tree that git cannot deliver; the message has the reason in one line without a full stop."""


@dataclass(frozen=True)
class Tree:
    """The files of a commit, in a folder without git's own data."""

    path: Path
    commit: str
    missing: list[str]
    """The files of the commit that the repository does not have."""


def fetch(repository: str, reference: str, space: Path) -> Tree:
    """Return the tree of a tag or commit of `repository`, written to a new folder in `space`.

    Raises:
        GitError: git is not installed, cannot reach the repository, finds no such tag or commit, or takes too long.
    """
    if not REFERENCE.fullmatch(reference) or ".." in reference:
        raise GitError(f"{reference!r} is no name of a tag or commit")
    folder = space / "git"
    git("init", "--quiet", "--template=", str(folder))
    local = Path(repository).expanduser()
    try:
        commit = borrow(local.resolve(), reference, folder) if local.is_dir() else download(repository, reference, folder)
        tree = Tree(folder, commit, check_out(folder, commit))
    except GitError as exc:
        raise GitError(str(exc).replace(repository, shown(repository))) from None
    shutil.rmtree(folder / ".git")
    return tree


def shown(repository: str) -> str:
    """Return the repository's name without the user and password that a URL may have, for messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", repository)


def borrow(repository: Path, reference: str, folder: Path) -> str:
    """Let the git repository in `folder` read another one's objects, and return the commit of `reference` there."""
    objects = git("-C", str(repository), "rev-parse", "--git-path", "objects", within=repository).strip()
    alternates = folder / ".git" / "objects" / "info" / "alternates"
    alternates.parent.mkdir(exist_ok=True)
    alternates.write_text(f"{(repository / objects).resolve()}\n", encoding="utf-8")
    for name in [f"refs/tags/{reference}", *([reference] if is_commit(reference) else [])]:
        verify = ("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if commit := git("-C", str(repository), *verify, within=repository, quiet=True).strip():
            return commit
    raise GitError(f"there is no tag or commit {reference} in {repository}")


def download(repository: str, reference: str, folder: Path) -> str:
    """Fetch the commit of `reference` into the git repository in `folder`, and return it."""
    wanted = f"refs/tags/{reference}"
    if wanted not in listed(repository, wanted):
        if not is_commit(reference):
            raise GitError(f"there is no tag {reference} in {repository}")
        wanted = reference if len(reference) == COMMIT_DIGITS else tagged(repository, reference)
    git("-C", str(folder), "fetch", "--quiet", "--depth=1", "--no-tags", "--", repository, wanted, seconds=FETCH_SECONDS)
    return git("-C", str(folder), "rev-parse", "--verify", "FETCH_HEAD^{commit}").strip()


def listed(repository: str, *patterns: str) -> dict[str, str]:
    """Return the references of a repository with the objects that they name; `refs/tags/v1^{}` names the tag's commit."""
    lines = git("ls-remote", "--", repository, *patterns).splitlines()
    return {name: object_id for object_id, name in (line.split("\t", 1) for line in lines)}


def tagged(repository: str, digits: str) -> str:
    """Return the tag whose commit begins with `digits`; a server resolves no other abbreviated commit."""
    names = sorted(name for name, commit in listed(repository, "refs/tags/*").items() if commit.startswith(digits))
    if not names:
        raise GitError(f"no tag of {repository} is at a commit {digits}; name the commit by all of its {COMMIT_DIGITS} digits")
    return names[0].removesuffix("^{}")


def is_commit(reference: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{SHORTEST_COMMIT},{COMMIT_DIGITS}}}", reference) is not None


def check_out(folder: Path, commit: str) -> list[str]:
    """Write the files of a commit, byte for byte, and return the names of those that are not in the repository."""
    exact = ("-C", str(folder), "-c", "core.autocrlf=false")
    missing = absent(folder, commit)
    git(*exact, "read-tree", commit)
    git(*exact, "update-index", "-z", "--force-remove", "--stdin", given="".join(f"{name}\0" for name in missing))
    git(*exact, "checkout-index", "--all", "--quiet", seconds=FETCH_SECONDS)
    return missing


def absent(folder: Path, commit: str) -> list[str]:
    """Return the files of a commit whose content the repository lacks; git submodules are not counted."""
    entries = git("-C", str(folder), "ls-tree", "-r", "-z", commit).rstrip("\0").split("\0")
    blobs = [(name, word.split()[2]) for word, name in (entry.split("\t", 1) for entry in entries) if " blob " in word]
    object_ids = "".join(f"{object_id}\n" for _, object_id in blobs)
    states = git("-C", str(folder), "cat-file", "--batch-check", given=object_ids).splitlines()
    return [name for (name, _), state in zip(blobs, states, strict=True) if state.endswith(" missing")]


def git(
    *arguments: str, seconds: float | None = None, within: Path | None = None, given: str = "", quiet: bool = False
) -> str:
    """Run git with `given` as its input, and return its output.

    After `seconds`, by default `PROBE_SECONDS`, git and the processes that it started are killed. `within` is a folder that
    must be a git repository itself: git does not search the folders above. With `quiet`, status 1 gives an empty output.

    Raises:
        GitError: git cannot be run, takes too long or fails.
    """
    stalled = ("-c", f"http.lowSpeedLimit={STALLED_BYTES_PER_SECOND}", "-c", f"http.lowSpeedTime={STALLED_SECONDS}")
    # Files, not pipes: a process that git leaves running in the background could keep a pipe open.
    with scratch_file(given) as source, scratch_file() as output, scratch_file() as errors:
        try:
            process = subprocess.Popen(
                ["git", *stalled, *arguments],
                stdin=source,
                stdout=output,
                stderr=errors,
                env=environment(within),
                start_new_session=True,  # without a terminal to ask on, and as a group that can be killed
            )
        except FileNotFoundError:
            raise GitError("git is not installed") from None
        try:
            status = process.wait(PROBE_SECONDS if seconds is None else seconds)
        except subprocess.TimeoutExpired as exc:
            raise GitError(f"git {command_of(arguments)} did not end within {exc.timeout:.0f} s") from None
        finally:
            with suppress(
                ProcessLookupError, PermissionError
            ):  # all have ended; for processes not yet waited for, macOS raises the latter
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        if status != 0 and not (quiet and status == 1):
            raise GitError(f"git {command_of(arguments)} failed: {reason(errors.read()) or f'status {status}'}")
        return output.read()


@contextmanager
def scratch_file(text: str = "") -> Iterator[IO[str]]:
    """Open a file without a name that begins with `text`, to be read from its beginning."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.seek(0)
        yield file


def environment(within: Path | None) -> dict[str, str]:
    """Return the environment in which git asks no questions and works on the named repository."""
    kept = {name: value for name, value in os.environ.items() if name not in OTHER_REPOSITORY}
    never_ask = {"GIT_TERMINAL_PROMPT": "0", "SSH_ASKPASS_REQUIRE": "never", "GCM_INTERACTIVE": "never"}
    ceiling = {"GIT_CEILING_DIRECTORIES": str(within.parent)} if within else {}
    return {"GIT_ASKPASS": "false", **kept, **never_ask, **ceiling, **PLAIN}


def command_of(arguments: tuple[str, ...]) -> str:
    """Return the git command in the arguments: the first word that is no option and no option's value."""
    words = iter(arguments)
    for word in words:
        if word in ("-c", "-C"):
            next(words)
        else:
            return word
    raise AssertionError(arguments)


def reason(text: str) -> str:
    """Return the most useful line of git's messages: the first error, else the last line."""
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return next(iter([*failures[:1], *lines[-1:]]), "")
