"""What every result records about its origin: commit, versions, hardware, hashes; and strict JSON files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

# Instruction sets of x86 processors. With amx_bf16 a matrix product is several times as fast in bfloat16 as in float32.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "numpy", "scipy")


def git_state() -> dict:
    """{"commit", "dirty"} of the git checkout that contains this file; both None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict:
    """Versions of Python and of the packages that influence a result; None for a package that is not installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def hardware(device: torch.device) -> dict:
    """{"device", "name", "count", "memory_gib"} of a CUDA device or of this CPU, whose count is the threads in use.

    A CPU also has "instructions": those of INSTRUCTIONS that it supports, on which its speed in bfloat16 depends.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, count, memory, more = properties.name, torch.cuda.device_count(), properties.total_memory, {}
    else:
        name = _processor("model name") or platform.processor() or platform.machine()
        flags = (_processor("flags") or "").split()
        count, memory = torch.get_num_threads(), _memory()
        more = {"instructions": [instruction for instruction in INSTRUCTIONS if instruction in flags]}
    memory_gib = None if memory is None else round(memory / 2**30, 1)
    return {"device": device.type, "name": name, "count": count, "memory_gib": memory_gib, **more}


def _memory() -> int | None:
    """Bytes of this machine's memory; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor(field: str) -> str | None:
    """A field of the first processor in Linux's /proc/cpuinfo; None on other systems."""
    try:
        match = re.search(rf"^{field}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def command_line() -> list[str]:
    """sys.argv, the script without its folder. It contains no token of the Hub: every script refuses one as a flag."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters; its type if it has no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(model: torch.nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """Hex SHA-256 of a model's weights: the float32 bytes of its state_dict, tensors in the order of their names.

    Args:
        model: on any device.
        leave_out: tensors whose name contains one of these are left out, and so are empty tensors.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.numel() and not any(part in name for part in leave_out):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_json(path: str | Path):
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or nested more deeply than Python can read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: str | Path, value) -> None:
    """Write strict JSON, with NaN and infinities as null. `path` is replaced in one step, so it is always complete."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(Path(path), (text + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: a full disk does not destroy an earlier file. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def look_up(results: dict | None, key: str, *default):
    """The value at a dotted key of a results file; if it is missing, the default, or a KeyError without a default."""
    value = results
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if default:
                return default[0]
            raise KeyError(key)
        value = value[part]
    return value


def by_layer(values: dict[str, float | None], suffix: str) -> np.ndarray:
    """The values named `...layer.<i>.<suffix>`, in the order of the layers; NaN in place of None."""
    pattern = re.compile(rf"\blayer\.(\d+)\.{re.escape(suffix)}$")
    layers = {int(match[1]): value for name, value in values.items() if (match := pattern.search(name))}
    return np.array([layers[layer] for layer in sorted(layers)], dtype=float)  # None becomes NaN
