"""Outliers and quantization damage of the trained models, in pairs, beside the published figures: report and plots.

    python analyze_kurtosis.py                       # every run that train_model.py finished
    python analyze_kurtosis.py FOLDER HUB/NAME ...   # these models instead: any BERT-shaped masked-LM, own report
    python analyze_kurtosis.py FOLDER --text FILE    # on the lines of a text file, instead of data/
    python analyze_kurtosis.py --onnxruntime         # and run them in INT8, by ONNX Runtime
    python analyze_kurtosis.py --report_only         # the report again, from what was measured before

Reads   results/<run>.json, models/<run>/ (or the models named), both splits of data/ (or the text file)
Writes  results/report.md and report.html (the same, with its pictures, in one file), results/analysis.json,
        results/<picture>.png, and results/measured/<run>.json: everything that was measured of a run. The next analysis
        reads this file where nothing has changed, instead of measuring again, and then needs no model folder.
        Reports of named models go to results/<name>/, or to results/<name>+<name>/

DEFINITIONS.md defines every figure. Activations are those of the final model on held-out text, in eval mode, without
padding. Quantization is calibrated on training text and scored on the same held-out text, masked as in training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

from answer import PRIMARY, Finding, answer, findings
from folder import refuse_unwritable
from measurement import (
    CALIBRATION_SIZE,
    PUBLISHED_TEXTS,
    NotFinite,
    Texts,
    keep_measured,
    load,
    made_with,
    measure,
    measured_already,
    take_measured,
    texts_of,
)
from outliers import FFN
from page import html_page
from pictures import pictures
from published import ACTIVATIONS, PUBLISHED, PUBLISHED_FFN, WEIGHTS
from quantization import CALIBRATION_BATCHES, DRAWS
from questions import questions
from record import by_layer, git_state, one_line, versions, write_json, write_whole
from report import absent_notes, models_report, report, self_check_notes
from runs import MEASURED_DIR, Run, find_runs
from sets import from_modified_tree, headline, notes, refuse_copies, refuse_duplicates

MAX_NAME = 200  # bytes of a folder's name; file systems take 255

# ------------------------------------------------------------------------------------------------------------- results


def analysis(runs: list[Run], warned: list[str], all_findings: list[Finding], sequences: int, source: Path) -> dict:
    """Everything measured, beside the published figures, for analysis.json."""
    modules = dict.fromkeys([suffix for _, suffix, *_ in ACTIVATIONS] + [FFN, "output"])
    return {
        "git": git_state(),
        "record": is_record(runs),
        "versions": versions(),
        "statistic": "excess kurtosis (Gaussian = 0)",
        "held_out": {"text" if source.is_file() else "data_dir": str(source), "sequences": sequences},
        "notes": warned,
        "answer": " ".join(answer(runs, all_findings)),
        "questions": {key: asdict(answered) for key, answered in questions(all_findings).items()},
        "primary_metric": PRIMARY,
        "comparisons": by_metric(all_findings[0]) if all_findings else {},
        "other_sets": [
            {
                "runs": [run.name for run in other.group.runs],
                "steps": other.group.steps,
                "comparisons": by_metric(other),
            }
            for other in all_findings[1:]
        ],
        "published": {suffix: dict(zip(PUBLISHED, pair, strict=True)) for _, suffix, *pair in WEIGHTS + ACTIVATIONS}
        | {FFN: dict(zip(PUBLISHED, PUBLISHED_FFN, strict=True))},
        "runs": {
            run.name: {
                "model": run.model,
                "arm": run.arm,
                "diverged": run.diverged,
                "weights_sha256": run.digest,
                "measured": run.made_with | run.measured_at or None,
                "max_length": run.max_length,
                "held_out_tokens": run.tokens,
                "weights": {suffix: layer_statistics(run.weight_kurtosis, suffix) for _, suffix, *_ in WEIGHTS},
                "activations_training": {suffix: layer_statistics(run.training, suffix) for suffix in modules},
                "activations_held_out": {suffix: layer_statistics(run.held_out, suffix) for suffix in modules},
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
    """Whether this analysis and all results it reads come from unmodified checkouts, so that their code is known."""
    modified = any(from_modified_tree(run) or run.measured_at.get("dirty", False) is not False for run in runs)
    return git_state()["dirty"] is False and not modified


def by_metric(finding: Finding) -> dict[str, dict[str, dict]]:
    """{arm: {metric: the fields of its comparison}}."""
    return {
        arm: {metric: asdict(comparison) for metric, comparison in comparisons.items()}
        for arm, comparisons in finding.compared.items()
    }


def layer_statistics(kurtosis: dict[str, float | None], suffix: str) -> dict | None:
    """The kurtosis of one module in every layer, with mean and deviation; None where no layer has it."""
    values = by_layer(kurtosis, suffix)
    if not len(values):
        return None
    return {"mean": float(values.mean()), "population_std": float(values.std()), "layers": values.tolist()}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder or Hub name (default: every run)")
    per_draw = f"batches of {CALIBRATION_SIZE} training texts that static ranges come from, for each of {DRAWS} draws"
    for flag, kind, default, meaning in (
        ("--results_dir", Path, Path("results"), "results files of the runs"),
        ("--models_dir", Path, Path("models"), "model folders of the runs"),
        ("--data_dir", Path, Path("data"), "what build_dataset.py wrote"),
        ("--max_samples", command.positive, 500, "number of held-out texts, evenly spread over the split"),
        ("--max_scored", command.positive, 500, "how many of them are scored under each quantization, which is slow"),
        ("--batch_size", command.positive, 16, "texts in a batch"),
        ("--calibration_batches", command.positive, CALIBRATION_BATCHES, per_draw),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="for named models, instead of --data_dir: UTF-8 text, plain, .gz or .zst, one text a line; of its "
        "different lines, every second one is scored and the others calibrate the quantization",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="where the report goes (default: --results_dir; for named models a folder in it, with their names)",
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="also export every model to ONNX, quantize it to INT8 with ONNX Runtime and run it: loss, size, latency",
    )
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="make report and pictures again from the results files and what was measured before; needs no models",
    )
    args = parser.parse_args(argv)
    if args.report_only and (args.models or args.onnxruntime):
        parser.error("--report_only measures nothing: leave out the models and --onnxruntime")
    if args.text and not args.models:
        parser.error("--text needs named models: the runs of the experiment are all measured on the text of --data_dir")
    if args.data_dir.is_file():
        parser.error(f"--data_dir {args.data_dir} is a file: give your own text with --text, and name the models")
    if args.text and not args.text.is_file():
        parser.error(f"--text {args.text} is not a file")
    return args


def output_folder(args: argparse.Namespace, runs: list[Run]) -> Path:
    """Where the report goes. Named models have a folder of their own, so that no report overwrites another."""
    if args.output_dir or not args.models:
        return args.output_dir or args.results_dir
    name = "+".join(run.name for run in runs)
    if len(name.encode()) > MAX_NAME:
        sys.exit("error: the names of these models are too long for a folder's name: choose one with --output_dir")
    return args.results_dir / name


def measure_all(
    runs: list[Run], args: argparse.Namespace, folder: Path, execute: Callable | None
) -> tuple[int, list[str]]:
    """Measure the models of all runs on the same texts, and keep in `folder` what was measured.

    What an earlier analysis kept there is read where nothing has changed since. Runs whose weights hold NaN or
    infinities are taken out of `runs`. Returns (number of texts, a line for each run that was taken out).
    """
    source = args.text or args.data_dir
    texts = Texts(
        texts_of(source, "validation", args.max_samples),
        args.max_scored,
        texts_of(source, "train", DRAWS * args.calibration_batches * CALIBRATION_SIZE),
        texts_of(source, "validation", PUBLISHED_TEXTS * args.calibration_batches),
        args.calibration_batches,
    )
    made = made_with(texts, args.batch_size, execute is not None)
    checked: set[str] = set()  # the arms on which the instrument has checked itself
    measured, left_out = [], []
    for run in runs:
        file, check = folder / f"{run.name}.json", run.arm not in checked
        on_hub = args.models and not Path(run.model).is_dir()  # a model on the Hub may change, so nothing is kept
        try:
            if run.diverged:
                pass
            elif not on_hub and measured_already(run, file, made, check):
                print(f"{run.name}: measured before, found in {file}", file=sys.stderr)
            else:
                measure(run, texts, args.batch_size, check, execute)
                if not on_hub:
                    keep_measured(run, file, made)
        except NotFinite as error:
            print(f"note: {error}", file=sys.stderr)
            left_out.append(str(error))
            continue
        if not run.diverged:
            checked.add(run.arm)
        measured.append(run)
        refuse_copies(measured)
    if not measured:
        sys.exit(f"error: nothing to report: {left_out[0]}")
    runs[:] = measured
    return len(texts.held_out), left_out


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    command.silence_libraries()
    execute = None
    if args.onnxruntime:
        try:
            from executed import execute  # imported here, because an analysis without it does not need its packages
        except ImportError as error:
            sys.exit(f"error: --onnxruntime needs onnx, onnxscript and onnxruntime: {one_line(error)}")
    if args.results_dir.exists():
        refuse_unwritable(args.results_dir)
    runs = find_runs(args.models, args.results_dir, args.models_dir)
    refuse_duplicates(runs)
    refuse_copies(runs)  # as far as training's records tell, before hours of measuring
    folder = output_folder(args, runs)
    measured = (folder if args.models else args.results_dir) / MEASURED_DIR
    for run in runs:  # a model that cannot be measured ends the script before hours of measuring
        if not (args.report_only or run.diverged or (measured / f"{run.name}.json").is_file()):
            load(run.model)
    refuse_unwritable(folder)
    left_out: list[str] = []
    if args.report_only:
        sequences = take_measured([run for run in runs if not run.diverged], measured)
        refuse_copies(runs)
    else:
        sequences, left_out = measure_all(runs, args, measured, execute)
    source = args.text or args.data_dir
    warned = [*self_check_notes(runs), *left_out, *absent_notes(runs), *notes(runs, source)]
    all_findings = findings(runs)
    drawn = pictures(headline(runs), sequences)
    captions = {name: (picture.title, picture.caption) for name, picture in drawn.items()}
    # The report of the experiment needs a pair of runs.
    if args.models and (args.text or not all_findings) and not any(run.diverged for run in runs):
        text = models_report(runs, warned, sequences, source, captions, is_record(runs))
    else:
        text = report(runs, warned, all_findings, sequences, source, captions, is_record(runs))
    print(text)

    write_json(folder / "analysis.json", analysis(runs, warned, all_findings, sequences, source))
    images = {name: picture.png for name, picture in drawn.items()}
    files = images | {"report.html": html_page(text, images).encode(), "report.md": text.encode()}
    for name, content in files.items():
        write_whole(folder / name, content)
    print(f"Written to {folder}: report.md, report.html, analysis.json, {', '.join(images)}")
    if left_out:
        sys.exit(f"error: {len(left_out)} of {len(runs) + len(left_out)} models left out: {' '.join(left_out)}")


if __name__ == "__main__":
    command.run(main)
