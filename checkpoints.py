"""The checkpoints of a training: what makes one whole, what is wrong with one, and which one a run goes on from."""

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

SUMS = "SHA256SUMS"  # as the program sha256sum writes and checks it


def seal(checkpoint: str | Path) -> None:
    """Write the checksums of all files of a checkpoint, which makes it whole; all of it is on the disk then.

    Raises:
        OSError: the disk does not take it.
    """
    folder = Path(checkpoint)
    partial = folder / f"{SUMS}.partial"
    partial.write_text(_sums(folder), encoding="utf-8")
    # An older checkpoint goes as soon as this one is whole, and a machine that loses its power forgets what it has not
    # written to the disk yet.
    for path in folder.iterdir():
        _to_disk(path)
    partial.replace(folder / SUMS)
    _to_disk(folder)


def _sums(folder: Path) -> str:
    """A line for each file in the folder, in the order of their names.

    SHA256SUMS itself has none, nor have hidden files: a Mac puts .DS_Store into a folder that is looked at.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith((SUMS, ".")))
    return "".join(f"{record.sha256(folder / name)}  {name}\n" for name in names)


def _to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file, or to the list of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_other_bytes(folder: Path) -> None:
    """Raise ValueError where a file is not what it was when the checkpoint was sealed, or is missing or new."""
    written = (folder / SUMS).read_bytes()
    found = _sums(folder).encode()
    if written != found:
        differing = set(written.splitlines()) ^ set(found.splitlines())
        names = {line[66:].decode(errors="replace") for line in differing}
        raise ValueError(f"{', '.join(sorted(names)) or SUMS}: not as {SUMS} has it")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def delete_checkpoints(folder: str | Path, keep: int = 0) -> None:
    """Delete the checkpoints in `folder` but the newest `keep`."""
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def read_progress(checkpoint: str | Path) -> dict:
    """progress.json of a checkpoint, as train_model.py wrote it; null in it is a number that was not finite.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is damaged.
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
    """What is wrong with a checkpoint, every file of which is read in full; None where it is whole.

    Nothing in it is run: transformers' Trainer too loads these files with weights_only=True.
    """
    if not (checkpoint / "progress.json").exists():  # of all but the checksums it is written last
        return "was interrupted while it was written"
    try:
        # Checkpoints of earlier versions have no checksums. They are taken when every file can be read.
        if (checkpoint / SUMS).exists():
            _refuse_other_bytes(checkpoint)
        read_progress(checkpoint)
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        AutoModelForMaskedLM.from_pretrained(checkpoint)
        random_states = sorted(checkpoint.glob("rng_state*.pth"))
        if not random_states:
            raise FileNotFoundError("no rng_state.pth")
        with safe_globals():
            for path in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states):
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half-written archives fail in as many ways as there are formats
        return f"is damaged ({record.one_line(error)})"
    return None


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`; None where there is none.

    Newer ones that are not whole are deleted, with a line each: what was interrupted while it was written, and what is
    damaged. Exits when the only one that was written to its end is damaged, since all its work would be lost unseen.
    """
    whole, useless = None, []
    for checkpoint in checkpoints(folder):
        if (why := damage(checkpoint)) is None:
            whole = str(checkpoint)
            break
        useless.append((checkpoint, why))
    if whole is None and (damaged := [said for said in useless if "damaged" in said[1]]):
        sys.exit(f"error: {damaged[0][0]} {damaged[0][1]}: delete that folder and start again")
    for path, why in useless:
        print(f"{path} {why}: deleted")
        shutil.rmtree(path)
    return whole


def checkpoint_to_go_on_from(wanted: str | None, folder: str) -> str | None:
    """The newest whole checkpoint in `folder`, or the one that --resume_from_checkpoint names; None where none is.

    Exits with one line where a checkpoint is wanted and there is none.
    """
    if wanted is None or wanted.lower() == "true":
        found = last_checkpoint(folder)
        if wanted and found is None:
            sys.exit(f"error: --resume_from_checkpoint True, but {folder} has no checkpoint: leave the flag out")
        return found
    if not Path(wanted).is_dir():
        sys.exit(f"error: --resume_from_checkpoint {wanted} is no folder: name a checkpoint, or True for the newest")
    if why := damage(Path(wanted)):
        sys.exit(f"error: {wanted} {why}: name another checkpoint, or leave the flag out")
    return wanted
