"""What a run writes down about itself, and how it is read: environment, versions, hashes, strict JSON."""

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

# Of x86 processors; a matrix product in bfloat16 is several times as fast as in float32 with amx_bf16.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "numpy", "scipy")


def git_state() -> dict:
    """{"commit", "dirty"} of the checkout that holds this file; both None outside a git checkout."""

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
    """Version of Python and of the packages that shape a result; None for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: torch.device) -> dict:
    """{"device", "name", "count", "memory_gib"} of a CUDA device or this CPU, whose count is the threads used.

    A CPU has "instructions" too: which of INSTRUCTIONS it has, because they say how fast its bfloat16 is.
    """
    instructions = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory
        count = torch.cuda.device_count()
        name = properties.name
    else:
        memory = _memory()
        count = torch.get_num_threads()
        name = _processor_name()
        instructions = {"instructions": _instructions()}
    found = {"device": device.type, "name": name, "count": count}
    found["memory_gib"] = None if memory is None else round(memory / 2**30, 1)
    return found | instructions


def _memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor(field: str) -> str | None:
    """What Linux says of the first processor; None elsewhere."""
    try:
        found = re.search(rf"^{field}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and found[1]


def _processor_name() -> str:
    return _processor("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    flags = (_processor("flags") or "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def command_line() -> list[str]:
    """sys.argv with the value of every flag that ends in `token` blanked, so that no secret is ever written down."""
    argv = [re.sub(r"^(--\w*token)=.*", r"\1=<secret>", argument) for argument in sys.argv]
    argv[0] = Path(argv[0]).name  # no path of this machine
    for i, argument in enumerate(argv[:-1]):
        if re.fullmatch(r"--\w*token", argument):
            argv[i + 1] = "<secret>"
    return argv


def one_line(error: BaseException) -> str:
    """The message of an error as one line, for the line that a script ends with."""
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
        leave_out: tensors with one of these in their name do not count, nor do empty ones.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.numel() and not any(part in name for part in leave_out):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_json(path: str | Path):
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested deeper than Python reads it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: str | Path, value) -> None:
    """Write strict JSON, NaN and infinities as null, beside `path` first, so that `path` is always whole."""
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
    """The value at a dotted key of a results file, or the default where it is missing (KeyError without a default)."""
    value = results
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if default:
                return default[0]
            raise KeyError(key)
        value = value[part]
    return value


def by_layer(values: dict[str, float | None], suffix: str) -> np.ndarray:
    """The values named `...layer.<i>.<suffix>`, in the order of the layers; NaN where a layer holds None."""
    pattern = re.compile(rf"\blayer\.(\d+)\.{re.escape(suffix)}$")
    layers = {int(match[1]): value for name, value in values.items() if (match := pattern.search(name))}
    return np.array([layers[layer] for layer in sorted(layers)], dtype=float)  # turns None into NaN
