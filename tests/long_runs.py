"""Memory and open files of four stages with a tiny model, sampled while they run, as figures and as a picture.

    python tests/long_runs.py                     all of them, into docs/long_runs.json and docs/long_runs.png
    python tests/long_runs.py training analysis   some of them; the figures of the others are kept

Each stage is a script or function of the project in its own process. Memory is measured without mapped files (RssAnon)
and with them (VmRSS); the system can take back the memory of mapped files at any time. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import plots
import record
from plots import COLOURS, STYLE, WIDTH, plt

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs"
FIGURES = ("seconds", "own_mb", "resident_mb", "open_files")
LOOK_SECONDS = 0.25
LINES = 2_000_000
SIZE = "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=32,max_position_embeddings=26"
TOKENIZE = """
from pathlib import Path
from corpus import load_data, load_tokenizer, tokenized
tokenized(load_data("data")[0], Path("tokenized"), load_tokenizer("tokenizer", 400), 24)
"""
SAMPLE = ["build_dataset.py", "--sample", "--validation_fraction", "0.1", "--output_dir", "few"]
TOKENIZER = ["train_tokenizer.py", "--data_dir", "few", "--vocab_size", "400"]
DATASET = ["build_dataset.py", "--from_files", "lines.txt", "--validation_fraction", "0.01"]
TRAINING = f"""train_model.py --softmax_n 1 --data_dir few --vocab_size 400 --max_length 24 --config_overrides {SIZE}
    --max_steps 10000 --per_device_train_batch_size 2 --logging_steps 100 --eval_steps 500 --save_steps 500
    --max_eval_samples 16 --use_cpu --disable_tqdm true""".split()
ANALYSIS = """analyze_kurtosis.py models/esperberto-softmax1 --max_samples 10000 --batch_size 1 --max_scored 100
    --calibration_batches 1""".split()

# Name: (amount of work, commands that must run before, the command).
STAGES = {
    "dataset": (f"{LINES:,} lines", [], DATASET),
    "tokenization": (f"{LINES // 1000:,} batches of 1,000 lines", [SAMPLE, TOKENIZER, DATASET], ["-c", TOKENIZE]),
    "training": ("10,000 steps", [SAMPLE, TOKENIZER], TRAINING),
    "analysis": ("10,000 texts, one by one", [SAMPLE, TOKENIZER, DATASET, TRAINING], ANALYSIS),
}


def started(command: list[str], folder: Path) -> subprocess.Popen:
    command = [str(ROOT / part) if part.endswith(".py") else part for part in command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log)


def look(pid: int) -> tuple[float, float, int]:
    """(MB without mapped files, MB with them, open files) of a process. Raises OSError or KeyError if it has ended."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    kilobytes = {words[0]: int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmRSS:")}
    return kilobytes["RssAnon:"] / 1024, kilobytes["VmRSS:"] / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def watched(command: list[str], folder: Path) -> dict[str, list]:
    """Run a command to its end; {figure: its value at every look at it}."""
    process, began = started(command, folder), time.monotonic()
    seen = []
    while process.poll() is None:
        try:
            seen.append((round(time.monotonic() - began, 2), *(round(figure, 1) for figure in look(process.pid))))
        except (OSError, KeyError):  # it is ending
            pass
        time.sleep(LOOK_SECONDS)
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:1])} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return dict(zip(FIGURES, map(list, zip(*seen, strict=True)), strict=True))


def growth(values: list[float]) -> float:
    """Median of the last fifth of the values minus that of the second. In the first fifth, modules are imported."""
    fifth = len(values) // 5
    return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth])


def measure(wanted: list[str]) -> Iterator[tuple[str, dict]]:
    """Yield (stage, figures) of the wanted stages, with a text and a model that are made for them."""
    done = set()
    sentences = (ROOT / "sample" / "esperanto.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "lines.txt", "w", encoding="utf-8") as file:
            file.writelines(f"{sentences[i % len(sentences)]} {i}\n" for i in range(LINES))
        for stage in [stage for stage in STAGES if stage in wanted]:
            what, before, command = STAGES[stage]
            for needed in before:
                if tuple(needed) not in done and started(needed, folder).wait():
                    sys.exit(f"error: {needed[0]} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
                done.add(tuple(needed))
            seen = watched(command, folder)
            done.add(tuple(command))
            grown = {figure: round(growth(seen[figure]), 1) for figure in ("own_mb", "open_files")}
            argv = ["python", *(part.replace("\n", "; ").strip("; ") for part in command)]
            print(f"{stage}: {what}, {seen['seconds'][-1]:.0f} s; more in the last fifth than in the second: {grown}")
            yield stage, {"argv": argv, "grown": grown, **seen}


def draw(stages: dict) -> None:
    """Draw a panel for each stage: memory (left axis) and open files (right axis) over time."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 6.4), layout="constrained")
        for panel, (stage, seen) in zip(panels.flat, stages.items(), strict=False):
            files = panel.twinx()
            lines = []
            for axes, name, label, (colour, _, dash) in (
                (panel, "own_mb", "own memory, MB", COLOURS[0]),
                (panel, "resident_mb", "with mapped files, MB", COLOURS[1]),
                (files, "open_files", "open files (right)", COLOURS[3]),
            ):
                lines += axes.plot(seen["seconds"], seen[name], color=colour, linestyle=dash, label=label)
                axes.set_ylim(0, 1.25 * max(seen[name]))
            files.grid(False)
            panel.set_title(f"{stage}:\n{STAGES[stage][0]}")
            panel.set_xlabel("seconds")
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
        (OUTPUT / "long_runs.png").write_bytes(plots._png(figure))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no stage {unknown.pop()}: there are {', '.join(STAGES)}")
    file = OUTPUT / "long_runs.json"
    stages = record.read_json(file)["stages"] if file.exists() else {}
    about = {"command": record.command_line(), "git": record.git_state(), "versions": record.versions()}
    about |= {"date": time.strftime("%Y-%m-%d"), "hardware": record.hardware(torch.device("cpu"))}
    for stage, seen in measure(args.stages or list(STAGES)):
        stages[stage] = {**about, **seen}
        stages = {stage: stages[stage] for stage in STAGES if stage in stages}  # in their order
        record.write_json(file, {"stages": stages})
        draw(stages)


if __name__ == "__main__":
    main()
