"""Checkpoints of a training: when one is complete, what is damaged in one, and from which one a run continues."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, TrainerState
from transformers.trainer_pt_utils import safe_globals

import record

SUMS = "SHA256SUMS"  # in the format of the program sha256sum. Written last: with it a checkpoint is complete.


def seal(checkpoint: str | Path) -> None:
    """Complete a checkpoint: write the checksums of its files, and force all of it to the disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    folder = Path(checkpoint)
    partial = folder / f"{SUMS}.partial"
    partial.write_text(_sums(folder), encoding="utf-8")
    # The older checkpoint is deleted once this one is complete, and a power failure loses what is not on the disk yet.
    for path in folder.iterdir():
        _to_disk(path)
    partial.replace(folder / SUMS)
    _to_disk(folder)


def _sums(folder: Path) -> str:
    """A line for each file in the folder, sorted by name, except SHA256SUMS itself and hidden files.

    macOS creates a hidden file, .DS_Store, in every folder that its Finder shows.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith((SUMS, ".")))
    return "".join(f"{record.sha256(folder / name)}  {name}\n" for name in names)


def _to_disk(path: Path) -> None:
    """Wait until the content of a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_other_bytes(folder: Path) -> None:
    """Raise ValueError if a file was changed, added or deleted since the checkpoint was sealed."""
    sealed = (folder / SUMS).read_bytes()
    present = _sums(folder).encode()
    if sealed != present:
        differing = set(sealed.splitlines()) ^ set(present.splitlines())
        names = {line[66:].decode(errors="replace") for line in differing}
        raise ValueError(f"{', '.join(sorted(names)) or SUMS}: not as {SUMS} has it")


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints in `folder`, complete or not, the newest first."""
    paths = [
        path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal() and path.is_dir()
    ]
    return sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def delete_checkpoints(folder: str | Path, keep: int = 0) -> None:
    """Delete the checkpoints in `folder`, except the newest `keep`."""
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def read_progress(checkpoint: str | Path) -> dict:
    """progress.json of a checkpoint, as train_model.py wrote it; null stands for a number that was not finite.

    Raises:
        OSError, ValueError, LookupError, TypeError: the file is damaged.
    """
    progress = record.read_json(Path(checkpoint) / "progress.json")

    def number(value) -> float:
        return math.nan if value is None else float(value)

    last_logged, losses = progress["loss_window"]
    return {
        "settings": dict(progress["settings"]),
        "seconds": float(progress["seconds"]),
        "counts": {name: int(progress["counts"][name]) for name in ("samples", "tokens", "padded_tokens")},
        "activation_kurtosis": {
            name: [number(total), int(count)] for name, (total, count) in progress["activation_kurtosis"].items()
        },
        "emergence": [dict(entry) for entry in progress["emergence"]],
        "loss_window": (int(last_logged), [number(loss) for loss in np.atleast_1d(losses)]),
    }


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, after reading all of every file; None if it is complete.

    No code in it is run: like transformers' Trainer, this loads files with weights_only=True.
    """
    if not (checkpoint / "progress.json").exists():
        return "was interrupted while it was written"
    try:
        if (checkpoint / SUMS).exists():  # a copy may lack it
            _refuse_other_bytes(checkpoint)
        # Checksums that fit do not show that the files come from this project.
        read_progress(checkpoint)
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        AutoModelForMaskedLM.from_pretrained(checkpoint)
        random_states = sorted(checkpoint.glob("rng_state*.pth"))
        if not random_states:
            raise FileNotFoundError("no rng_state.pth")
        with safe_globals():
            for path in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states):
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format has its own kinds of errors
        return f"is damaged ({record.one_line(error)})"
    return None


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in `folder`; None if there is none.

    Newer checkpoints, which are interrupted or damaged, are deleted, and one line is printed for each. If there is no
    complete checkpoint but a damaged one, the script exits instead, because all work would be lost without notice.
    """
    complete, useless = None, []
    for checkpoint in checkpoints(folder):
        if (why := damage(checkpoint)) is None:
            complete = str(checkpoint)
            break
        useless.append((checkpoint, why))
    for path, why in useless:
        if complete is None and "damaged" in why:
            sys.exit(f"error: {path} {why}: delete that folder and start again")
    for path, why in useless:
        print(f"{path} {why}: deleted")
        shutil.rmtree(path)
    return complete


def checkpoint_to_go_on_from(wanted: str | None, folder: str) -> str | None:
    """The newest complete checkpoint in `folder`, or the one that --resume_from_checkpoint names; None without any.

    `wanted` is the value of that flag: None, "True" for the newest, or the path of a checkpoint. Exits with one line if
    a checkpoint is wanted and there is none.
    """
    if wanted is None or wanted.lower() == "true":
        newest = last_checkpoint(folder)
        if wanted and newest is None:
            sys.exit(f"error: --resume_from_checkpoint True, but {folder} has no checkpoint: leave the flag out")
        return newest
    if not wanted or not Path(wanted).is_dir():  # "" would be this folder
        sys.exit(f"error: --resume_from_checkpoint {wanted} is not a folder: name a checkpoint, or True for the newest")
    if why := damage(Path(wanted)):
        sys.exit(f"error: {wanted} {why}: name another checkpoint, or leave the flag out")
    return wanted
