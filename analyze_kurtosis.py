"""Outliers and quantization damage of the trained models, in pairs, beside the published figures: report and plots.

    python analyze_kurtosis.py                       # every run that train_model.py finished
    python analyze_kurtosis.py FOLDER HUB/NAME ...   # these models instead: any BERT-shaped masked-LM
    python analyze_kurtosis.py --onnxruntime         # and run them in INT8, by ONNX Runtime

Reads   results/<run>.json, models/<run>/ (or the models named), both splits of data/
Writes  results/report.md and report.html (the same, in one file), results/analysis.json, results/<picture>.png

What is measured is defined in DEFINITIONS.md. Activations: of the final model on held-out text, in eval mode, padding
left out. Quantization: calibrated on training text, scored on the same held-out text, masked as in training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import transformers

from answer import PRIMARY, Finding, answer, findings
from folder import refuse_unwritable
from measurement import (
    CALIBRATION_SIZE,
    PUBLISHED_TEXTS,
    Texts,
    fingerprint,
    keep_measured,
    measure,
    measured_already,
    texts_of,
)
from page import html_page
from pictures import pictures
from quantization import CALIBRATION_BATCHES, DRAWS
from questions import questions
from record import git_state, one_line, versions, write_json
from report import (
    ACTIVATIONS,
    FFN,
    PUBLISHED,
    PUBLISHED_FFN,
    WEIGHTS,
    report,
    self_check_notes,
)
from runs import Run, by_layer, find_runs
from sets import from_modified_tree, headline, notes, refuse_copies, refuse_duplicates

# ------------------------------------------------------------------------------------------------------------- results


def analysis(runs: list[Run], warned: list[str], found: list[Finding], sequences: int, data_dir: Path) -> dict:
    """Everything measured, beside the published figures, for analysis.json."""
    modules = dict.fromkeys([suffix for _, suffix, *_ in ACTIVATIONS] + [FFN, "output"])
    compared = found[0].compared if found else {}
    return {
        "git": git_state(),
        "record": is_record(runs),
        "versions": versions(),
        "statistic": "excess kurtosis (Gaussian = 0)",
        "held_out": {"data_dir": str(data_dir), "sequences": sequences},
        "notes": warned,
        "answer": answer(runs, found),
        "questions": {key: asdict(one) for key, one in questions(found).items()},
        "primary_metric": PRIMARY,
        "comparisons": {arm: {metric: asdict(one) for metric, one in each.items()} for arm, each in compared.items()},
        "other_sets": [
            {
                "runs": [run.name for run in other.group.runs],
                "steps": other.group.steps,
                "comparisons": {
                    arm: {metric: asdict(one) for metric, one in each.items()} for arm, each in other.compared.items()
                },
            }
            for other in found[1:]
        ],
        "published": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in WEIGHTS + ACTIVATIONS}
        | {FFN: dict(zip(PUBLISHED, PUBLISHED_FFN, strict=True))},
        "runs": {
            run.name: {
                "model": run.model,
                "arm": run.arm,
                "diverged": run.diverged,
                "weights_sha256": run.digest,
                "max_length": run.max_length,
                "held_out_tokens": run.tokens,
                "weights": {suffix: layers(run.weight_kurtosis, suffix) for _, suffix, *_ in WEIGHTS},
                "activations_training": {suffix: layers(run.training, suffix) for suffix in modules},
                "activations_held_out": {suffix: layers(run.held_out, suffix) for suffix in modules},
                "parameters": run.weights,
                "places": run.places,
                "attention": run.attention,
                "attention_uniform": run.attention_uniform,
                "untrained": run.untrained or None,
                "interventions": run.interventions,
                "quantization": run.damage,
            }
            for run in runs
        },
    }


def is_record(runs: list[Run]) -> bool:
    """Whether this analysis and all results it reads were made from unmodified checkouts, which can be looked up."""
    return git_state()["dirty"] is False and not any(from_modified_tree(run) for run in runs)


def layers(kurtosis: dict[str, float | None], suffix: str) -> dict | None:
    values = by_layer(kurtosis, suffix)
    if not len(values):
        return None
    return {"mean": float(values.mean()), "population_std": float(values.std()), "layers": values.tolist()}


def write(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a full disk costs no earlier report."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, got {text!r}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder or Hub name (default: every run)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="results files; the report goes here")
    parser.add_argument("--models_dir", type=Path, default=Path("models"), help="model folders of the runs")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="what build_dataset.py wrote")
    parser.add_argument("--max_samples", type=positive, default=500, help="held-out texts, evenly spread")
    parser.add_argument(
        "--max_scored",
        type=positive,
        default=500,
        help="of these texts, those that are scored under each quantization: a CPU is slow in bfloat16",
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="texts at a time")
    parser.add_argument(
        "--calibration_batches",
        type=positive,
        default=CALIBRATION_BATCHES,
        help=f"batches of {CALIBRATION_SIZE} training texts that static ranges come from, for each of {DRAWS} draws",
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="also export every model to ONNX, quantize it to INT8 with ONNX Runtime and run it: loss, size, latency",
    )
    return parser.parse_args(argv)


def executor(wanted: bool) -> Callable | None:
    """executed.execute if it is wanted; exits with one line where a package for it is missing."""
    if not wanted:
        return None
    try:
        import executed  # here, so that an analysis without it needs none of its packages
    except ImportError as error:
        sys.exit(f"error: --onnxruntime needs onnx, onnxscript and onnxruntime (requirements.txt): {one_line(error)}")
    return executed.execute


def measure_or_take(run: Run, texts: Texts, args: argparse.Namespace, checked: bool, execute: Callable | None) -> None:
    """Measure a run, or take what an earlier analysis has measured where nothing has changed since."""
    if not run.results or not Path(run.model).is_dir():  # a model of somebody else's
        measure(run, texts, args.batch_size, checked, execute)
        return
    kept = args.results_dir / "measured" / f"{run.name}.json"
    wanted = fingerprint(run, texts, args.batch_size, execute is not None)
    if measured_already(run, kept, wanted, checked):
        print(f"{run.name}: measured before, found in {kept}", file=sys.stderr)
        return
    measure(run, texts, args.batch_size, checked, execute)
    keep_measured(run, kept, wanted)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    refuse_unwritable(args.results_dir)  # this and the next before hours of measuring
    execute = executor(args.onnxruntime)
    # One clear line instead of theirs.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)

    runs = find_runs(args.models, args.results_dir, args.models_dir)
    refuse_duplicates(runs)
    refuse_copies(runs)  # by what training wrote, before hours of measuring
    texts = Texts(
        texts_of(args.data_dir, "validation", args.max_samples),
        args.max_scored,
        texts_of(args.data_dir, "train", DRAWS * args.calibration_batches * CALIBRATION_SIZE),
        texts_of(args.data_dir, "validation", PUBLISHED_TEXTS * args.calibration_batches),
        args.calibration_batches,
    )
    checked: set[str] = set()  # the arms on which the instrument has checked itself
    for i, run in enumerate(runs):
        if not run.diverged:
            measure_or_take(run, texts, args, run.arm not in checked, execute)
            checked.add(run.arm)
        refuse_copies(runs[: i + 1])
    warned = [*self_check_notes(runs), *notes(runs, args.data_dir)]
    found = findings(runs)
    made = pictures(headline(runs), len(texts.held_out))
    captions = {name: (picture.title, picture.caption) for name, picture in made.items()}
    text = report(runs, warned, found, len(texts.held_out), args.data_dir, captions, is_record(runs))
    print(text)

    write_json(args.results_dir / "analysis.json", analysis(runs, warned, found, len(texts.held_out), args.data_dir))
    images = {name: picture.png for name, picture in made.items()}
    for name, picture in images.items():
        write(args.results_dir / name, picture)
    write(args.results_dir / "report.html", html_page(text, images).encode())
    write(args.results_dir / "report.md", text.encode())
    print(f"Written to {args.results_dir}: report.md, report.html, analysis.json, {', '.join(images)}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
