"""Output folders that are either complete or absent: built beside their place, then moved into it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from record import read_json


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one process at a time into the block that makes `path`; says so when it has to wait for another.

    The lock is a file beside `path`, which holds the process id of its holder. The system releases it when that process
    ends, however it ends; then the file may stay.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        lock = _acquire(path)
    except Timeout:
        print(f"Waiting for {_holder(path)}, which is making {path}", flush=True)
        lock = _acquire(path, seconds=-1)
    try:
        yield
    finally:
        _release(lock)


@contextmanager
def sole(path: str | Path) -> Iterator[None]:
    """The same, but end every other process with one line.

    Raises:
        SystemExit: another process works there.
        OSError: the file cannot be written.
    """
    try:
        lock = _acquire(path)
    except Timeout:
        sys.exit(f"error: {_holder(path)} is at work on {path}: wait until it has ended, or end it")
    try:
        yield
    finally:
        _release(lock)


def _acquire(path: str | Path, seconds: float = 0) -> FileLock:
    """The lock of `path`, acquired. Raises Timeout when it is not free in time; -1 waits for ever."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    lock.acquire(timeout=seconds)
    Path(lock.lock_file).write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


def _release(lock: FileLock) -> None:
    """Delete the file and release the lock. One who waits for it sees that the file has gone, and makes a new one."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _holder(path: str | Path) -> str:
    """Who holds the lock of `path`."""
    try:
        return f"process {int(Path(f'{path}.lock').read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another process"


def refuse_unwritable(path: str | Path) -> None:
    """Exit with one line where nothing can be written to the folder `path`, before hours of work that would be lost.

    It is made if it is not there yet.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        why = error.strerror
        if isinstance(error, FileExistsError):
            why = "it is a file" if Path(path).is_file() else "it is a link that leads to no folder"
        sys.exit(f"error: nothing can be written to {path} ({why}): choose another folder or make room")


@contextmanager
def replacing(path: str | Path, ours: tuple[str, ...], overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and disappears when the block fails.

    A folder counts as complete when it holds a manifest.json, so that is what the block should write last.

    Args:
        path: the folder to make. It may exist if it is empty, or if it is an earlier result and `overwrite` is given.
        ours: patterns for the names an earlier result holds. A folder with anything else in it is never replaced.
        overwrite: replace an earlier result; it stays in its place until the block has ended well.

    Raises:
        SystemExit: with one line, before the block runs, if `path` may not be replaced.
        OSError: if the disk does not allow it.
    """
    try:
        target = Path(path).resolve()  # a link to a folder on a larger disk stays a link
    except RuntimeError:  # what Python before 3.13 says of links in a circle
        target = Path(path)
    if target.is_symlink():
        sys.exit(f"error: {path} is a link that leads to no folder: choose another --output_dir")
    if target.exists() and not target.is_dir():
        sys.exit(f"error: {path} is a file: choose another --output_dir")
    refuse_unwritable(target.parent)
    with scratch(target) as beside:
        entries = [entry.name for entry in target.iterdir()] if target.exists() else []
        foreign = [name for name in sorted(entries) if not any(fnmatch(name, pattern) for pattern in ours)]
        if foreign or (entries and "manifest.json" not in entries):
            found = foreign[0] if foreign else "no manifest.json"
            sys.exit(
                f"error: {path} is not an earlier result of this script (it has {found}): choose another --output_dir"
            )
        if entries and not overwrite:
            sys.exit(f"error: {path} exists and is complete: add --overwrite to replace it")
        if target.is_mount():
            sys.exit(f"error: {path} is a mount point and cannot be replaced: choose a folder inside it")

        new, old = beside / "new", beside / "old"
        new.mkdir()
        yield new
        if entries:
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if entries:
                old.rename(target)
            raise


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, on the same disk, that disappears when the block ends.

    One process at a time has such a folder. What others left that were killed is deleted; and where one was killed
    while it replaced `path`, what had been there returns.

    Raises:
        SystemExit: another process works there.
        OSError: the disk does not allow it.
    """
    prefix = f"{path.name}.partial-"
    with sole(path):
        for left in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
            if (left / "old").exists() and not path.exists():  # between the two renames of `replacing`
                (left / "old").rename(path)
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as made:
            yield Path(made)


def kept(path: str | Path, wanted: dict, made: Callable[[dict], dict] = dict) -> bool:
    """Whether `path` holds an earlier result that was made as is wanted now; False where nothing is there.

    Args:
        path: the folder.
        wanted: {name: value} of what shapes the result.
        made: the same of an earlier result, out of its manifest.json.

    Raises:
        SystemExit: with one line, where it was made otherwise.
    """
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        found = made(read_json(manifest))
        differing = [name for name, value in wanted.items() if found[name] != value]
    except (OSError, ValueError, LookupError, TypeError):
        sys.exit(f"error: {manifest} is damaged: move {path} away, or add --overwrite to make it again")
    if differing:
        name = differing[0]
        sys.exit(
            f"error: {path} is there and was made with {name} = {found[name]}, not {wanted[name]}: move it away, with "
            "what was made from it, or give the flags that it was made with"
        )
    print(f"{path}: found and kept")
    return True
