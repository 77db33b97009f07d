"""Output folders that are complete or absent: built next to their final place, then renamed."""

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
def locked(path: str | Path, wait: bool = True) -> Iterator[None]:
    """Let one process at a time run the block, which makes `path`. Another process waits, and says so, or ends.

    The lock is the file `<path>.lock`, which holds the id of the process that has it. The system releases the lock when
    that process ends, in whatever way; the file may then stay.

    Args:
        path: the file or folder that the block makes.
        wait: while another process has the lock, wait for it; otherwise end this process.

    Raises:
        SystemExit: with one line, if another process has the lock and `wait` is False.
        OSError: the lock file cannot be written.
    """
    path = Path(path)  # without a slash at its end
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            sys.exit(f"error: {_holder(path)} is at work on {path}: wait until it has ended, or end it")
        print(f"Waiting for {_holder(path)}, which is making {path}", flush=True)
        lock.acquire()
    try:
        Path(lock.lock_file).write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        # Deleted before it is released: a process that waits notices that the file is gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _holder(path: str | Path) -> str:
    """The process that has the lock of `path`, in words."""
    try:
        return f"process {int(Path(f'{path}.lock').read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another process"


def refuse_unwritable(path: str | Path) -> None:
    """Create the folder `path` if necessary, and exit with one line if no file can be written to it.

    Called before hours of work whose result would be lost.
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
    """Yield an empty folder that is renamed to `path` when the block succeeds, and deleted when it fails.

    A folder counts as complete if it contains a manifest.json, so the block must write that file last.

    Args:
        path: the folder to make. It may exist if it is empty, or if it is an earlier result and `overwrite` is True.
        ours: patterns of the names in an earlier result. A folder that contains any other name is never replaced.
        overwrite: replace an earlier result, which stays in place until the block has succeeded.

    Raises:
        SystemExit: with one line, before the block runs, if `path` must not be replaced.
        OSError: the disk does not allow it.
    """
    try:
        target = Path(path).resolve()  # a link to a folder on a larger disk remains a link
    except RuntimeError:  # Python before 3.13 raises it for a link to itself
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
            why = f"it has {foreign[0] if foreign else 'no manifest.json'}"
            sys.exit(f"error: {path} is not an earlier result of this script ({why}): choose another --output_dir")
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
    """Yield an empty folder next to `path`, on the same disk, that is deleted when the block ends.

    One process at a time has such a folder. Folders of killed processes are deleted first. If a process was killed
    while it replaced `path`, the earlier `path` is moved back.

    Raises:
        SystemExit: with one line, if another process has such a folder.
        OSError: the disk does not allow it.
    """
    prefix = f"{path.name}.partial-"
    with locked(path, wait=False):
        for leftover in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
            if (leftover / "old").exists() and not path.exists():  # killed between the two renames of `replacing`
                (leftover / "old").rename(path)
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
            yield Path(folder)


def kept(path: str | Path, wanted: dict, settings_of: Callable[[dict], dict] = dict) -> bool:
    """Whether `path` contains a complete result that was made with the settings `wanted`; False if there is none.

    Args:
        path: the folder.
        wanted: {name: value} of the settings that determine the result.
        settings_of: extracts these settings from the manifest.json of a result.

    Raises:
        SystemExit: with one line, if the result was made with other settings.
    """
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        settings = settings_of(read_json(manifest))
        differing = [name for name, value in wanted.items() if settings[name] != value]
    except KeyError as error:
        sys.exit(f"error: {manifest} does not say {error}, so another version made it: move {path} away")
    except (OSError, ValueError, LookupError, TypeError):
        sys.exit(f"error: {manifest} is damaged: move {path} away, or add --overwrite to make it again")
    if differing:
        name = differing[0]
        sys.exit(
            f"error: {path} is there and was made with {name} = {settings[name]}, not {wanted[name]}: move it away, "
            "together with everything that was made from it, or give the flags that it was made with"
        )
    print(f"{path}: found and kept")
    return True
