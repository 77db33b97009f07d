"""Fine-tune the trained models on tagged words and score them: part-of-speech accuracy of both arms.

    python tag_words.py FILE.conllu                        # every run that train_model.py finished
    python tag_words.py FILE.conllu FOLDER HUB/NAME ...    # these models instead

Reads   a CoNLL-U file (columns FORM and UPOS), models/<run>/ (or the models named)
Writes  results/tagging/<run>.json and results/tagging/report.md

The sentences are split into training, development and test parts by a fixed seed, the same for every model. Each model
is fine-tuned with several seeds (order of the sentences, new head, dropout). For each seed, the epoch with the best
accuracy on the development part is scored once on the test part. A word's tag is predicted from its first token.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import command

if __name__ == "__main__":
    command.begin()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
    set_seed,
)

import softmax1  # noqa: F401  (registers RoBERTa with softmax_n, so that from_pretrained below knows it)
from experiment import MAX_LENGTH
from folder import refuse_unwritable
from held_out import longest_text
from pairs import CONFIDENCE, TEST, compare, no_interval
from record import git_state, hardware, one_line, sha256, versions, write_json
from runs import labelled, refuse_missing, unused_layer

SPLIT_SEED = 0  # of training, development and test: the same for every model and seed
SHARES = (0.8, 0.1)  # of training and development; the rest is for the test
# Usual for fine-tuning a BERT on a few hundred sentences (Devlin et al. 2019 search among 2e-5 to 5e-5 and 2 to 4
# epochs; small data sets need more: Mosbach et al. 2021).
LEARNING_RATE = 5e-5
EPOCHS = 20
BATCH_SIZE = 16
WARMUP = 0.1
IGNORED = -100  # label of what has no tag: cross-entropy skips it


@dataclass
class Sentence:
    """Words and their tags, one for each."""

    words: list[str]
    tags: list[str]


# ------------------------------------------------------------------------------------------------------------ the data


def read_conllu(path: Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file (https://universaldependencies.org/format.html).

    Of a multiword token (1-2) only its parts are read. Empty nodes (1.1), which stand for no word of the text, and
    words without a tag (_) are skipped. A malformed file ends the script with one line that names the line of the file.
    """
    try:
        # Not splitlines(): it also ends a line at U+2028 and similar characters, which may stand in a word or comment.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {path} cannot be read ({one_line(error)}): name a CoNLL-U file in UTF-8")

    def stop(number: int, what: str) -> None:
        sys.exit(f"error: {path}, line {number}: {what}: not CoNLL-U, correct that line")

    sentences, words, tags, last = [], [], [], 0
    for number, line in enumerate([*lines, ""], 1):  # the last sentence may lack its blank line
        if not line.strip():
            if words:
                sentences.append(Sentence(words, tags))
            words, tags, last = [], [], 0
            continue
        if line.startswith("#"):
            continue
        columns = line.rstrip("\r").split("\t")
        if len(columns) < 10:
            stop(number, f"{len(columns)} columns between tabs instead of 10")
        identifier, form, tag = columns[0], columns[1], columns[3]
        if re.fullmatch(r"\d+-\d+|\d+\.\d+", identifier):
            continue
        if not identifier.isdecimal() or int(identifier) != last + 1:
            stop(number, f"word number {identifier!r} after {last}")
        if not form.strip() or not tag.strip():
            stop(number, "an empty form or tag")
        last += 1
        if tag != "_":
            words.append(form)
            tags.append(tag)
    return sentences


def split(sentences: list[Sentence]) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Training, development and test part, by SPLIT_SEED."""
    shuffled = sentences.copy()
    random.Random(SPLIT_SEED).shuffle(shuffled)
    first, second = (round(len(shuffled) * share) for share in (SHARES[0], sum(SHARES)))
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def encode(sentence: Sentence, tokenizer: PreTrainedTokenizerBase, tags: list[str]) -> tuple[list[int], list[int]]:
    """Token ids with <s> and </s>, and their labels: the word's tag at its first token, IGNORED elsewhere.

    Every word but the first is tokenized with a space before it, as in running text. The sentence is cut at MAX_LENGTH
    tokens. A tag that is not in `tags` gets a label that the model never predicts.
    """
    ids, labels = [], []
    for i, (word, tag) in enumerate(zip(sentence.words, sentence.tags, strict=True)):
        pieces = tokenizer(word if i == 0 else f" {word}", add_special_tokens=False)["input_ids"]
        label = tags.index(tag) if tag in tags else len(tags)
        ids += pieces
        labels += [label, *[IGNORED] * (len(pieces) - 1)] if pieces else []
    length = min(MAX_LENGTH, tokenizer.model_max_length) - 2
    start, end = ends(tokenizer)
    return [start, *ids[:length], end], [IGNORED, *labels[:length], IGNORED]


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The ids of the tokens that a sentence begins and ends with."""
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    return start, tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id


def batches(encoded: list[tuple[list[int], list[int]]], pad: int) -> list[dict[str, Tensor]]:
    """Padded batches of BATCH_SIZE sentences, in the order given."""
    made = []
    for start in range(0, len(encoded), BATCH_SIZE):
        ids, labels = zip(*encoded[start : start + BATCH_SIZE], strict=True)
        stacked = {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, fill)
            for name, rows, fill in (("input_ids", ids, pad), ("labels", labels, IGNORED))
        }
        stacked["attention_mask"] = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)).long() for row in ids], True)
        made.append(stacked)
    return made


# ------------------------------------------------------------------------------------------------ fine-tuning, scoring


def load(name: str, tags: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder of a folder or Hub name with a new head, and its tokenizer; exits with one line where that fails."""
    refuse_missing(name)
    try:
        model, loading = AutoModelForTokenClassification.from_pretrained(
            name, num_labels=len(tags), trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if hasattr(model.config, "max_position_embeddings"):
            tokenizer.model_max_length = min(MAX_LENGTH, tokenizer.model_max_length, longest_text(model))
    except Exception as error:  # what lies in a folder can be anything, and its readers raise anything
        sys.exit(f"error: {name} cannot be fine-tuned, its model or tokenizer does not load: {one_line(error)}")
    lacking = sorted(key for key in loading["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if lacking:  # the head alone is new
        sys.exit(f"error: {name} cannot be fine-tuned, its weights are not complete: it lacks {lacking[0]}")
    if spare := unused_layer(loading):
        sys.exit(
            f"error: {name} cannot be fine-tuned: config.json has fewer layers than the weights, which hold {spare}"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        sys.exit(f"error: {name} has no tokenizer, copy the one it was trained with there")
    if tokenizer.pad_token_id is None or None in ends(tokenizer):
        sys.exit(f"error: {name}: its tokenizer has no padding, start or end token, so this is no model like BERT")
    if len(tokenizer) > model.config.vocab_size:
        sys.exit(f"error: {name}: its tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        sys.exit(f"error: {name} cannot be fine-tuned: its weights hold NaN or infinities")
    return model, tokenizer


@torch.no_grad()
def accuracy(model: PreTrainedModel, batches_of_part: list[dict[str, Tensor]]) -> float:
    """Share of the words whose tag is predicted right."""
    model.eval()
    right = words = 0
    for batch in batches_of_part:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        words += int((labels != IGNORED).sum())
    return right / words


def fine_tune(name: str, parts: list[list[Sentence]], tags: list[str], seed: int, epochs: int, bar: tqdm) -> dict:
    """{"seed", "epoch", "development", "test"}: accuracies of the epoch that is best on the development part."""
    set_seed(seed)  # before loading: the new head is random
    model, tokenizer = load(name, tags)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    training, development, test = ([encode(sentence, tokenizer, tags) for sentence in part] for part in parts)
    development, test = (batches(part, tokenizer.pad_token_id) for part in (development, test))
    steps = epochs * -(-len(training) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    order = random.Random(seed)
    best = {"development": -1.0}
    state = None
    for epoch in range(1, epochs + 1):
        order.shuffle(training)
        model.train()
        for batch in batches(training, tokenizer.pad_token_id):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            loss = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
        if (score := accuracy(model, development)) > best["development"]:
            best = {"seed": seed, "epoch": epoch, "development": score}
            state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return {**best, "test": accuracy(model, test)}


# ------------------------------------------------------------------------------------------------------------- results


def seed_of(name: str) -> int:
    """The seed of a run by its name, `esperberto-softmax1-seed43`; 42 where it is not said."""
    match = re.search(r"-seed(\d+)$", name)
    return int(match[1]) if match else 42


def report(results: list[dict]) -> str:
    """Markdown: a row a model, and for every arm its difference to softmax0 over pairs of training seeds."""
    lines = [
        "# Part-of-speech accuracy after fine-tuning",
        "| model | test accuracy, % | development, % |\n| --- | --: | --: |",
    ]
    arms: dict[str, dict[int, float]] = {}
    for result in results:
        columns = []
        for part in ("test", "development"):
            scores = 100 * np.array([score[part] for score in result["scores"]])
            columns.append(f"{scores.mean():.2f}" + (f" ± {scores.std(ddof=1):.2f}" if len(scores) > 1 else ""))
        lines[-1] += f"\n| {result['run']} | {columns[0]} | {columns[1]} |"
        arm = re.sub(r"-seed\d+$", "", result["run"])
        arms.setdefault(arm, {})[seed_of(result["run"])] = 100 * float(
            np.mean([score["test"] for score in result["scores"]])
        )
    first = results[0]
    numbers = sorted({len(result["scores"]) for result in results})
    sizes = first["sentences"]
    lines.append(
        f"*Share of words with the right tag; ± is the sample standard deviation over fine-tuning seeds "
        f"(n = {'/'.join(map(str, numbers))}) of one model. {first['file']}: {sizes['training']} sentences for "
        f"training, {sizes['development']} for development, {sizes['test']} for the test ({first['test_words']} "
        f"words); {first['epochs']} epochs, learning rate {LEARNING_RATE:g}, batch {BATCH_SIZE}. The most frequent tag "
        f"of the training part everywhere: {100 * first['majority']:.2f} %.*"
    )
    for arm, scores in arms.items():
        baseline = next((name for name in arms if name.endswith("softmax0") and name != arm), None)
        if baseline and (comparison := compare(arms[baseline], scores)):
            interval = no_interval(comparison) or (
                f"{CONFIDENCE:.0%} interval {comparison.low:+.2f} to {comparison.high:+.2f}, {TEST}, "
                f"n = {comparison.pairs}"
            )
            lines.append(f"{arm} over {baseline}: {comparison.difference:+.2f} percentage points ({interval}).")
    return "\n\n".join(lines) + "\n"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.conllu", help="tagged sentences")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="model folder or Hub name (default: every run)")
    parser.add_argument(
        "--models_dir", type=Path, default=Path("models"), help="model folders of the runs (%(default)s)"
    )
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results"), help="tagging/ in it takes the results (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=command.positive, default=3, help="how often each model is fine-tuned (%(default)s)"
    )
    parser.add_argument(
        "--epochs", type=command.positive, default=EPOCHS, help="passes over the training part (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    command.silence_libraries()
    parts = split(read_conllu(args.file))
    if not all(parts):
        sys.exit(f"error: {args.file} has too few sentences to be split: it needs 10 or more")
    tags = sorted({tag for sentence in parts[0] for tag in sentence.tags})
    counts = {tag: sum(sentence.tags.count(tag) for sentence in parts[0]) for tag in tags}
    most = max(counts, key=counts.get)
    words = sum(len(sentence.tags) for sentence in parts[2])
    models = args.models or sorted(str(path) for path in args.models_dir.glob("esperberto-*") if path.is_dir())
    if not models:
        sys.exit(
            f"error: no models in {args.models_dir}/: run train_model.py first, or name a model folder or Hub model"
        )
    labels = labelled(models)
    for name in models:  # a model that cannot be used ends the script before hours of fine-tuning
        load(name, tags)

    folder = args.results_dir / "tagging"
    refuse_unwritable(folder)
    steps = len(models) * args.seeds * args.epochs * -(-len(parts[0]) // BATCH_SIZE)
    with tqdm(total=steps, unit="step") as bar:
        for name, run in zip(models, labels, strict=True):
            bar.set_description(run)
            scores = [fine_tune(name, parts, tags, seed, args.epochs, bar) for seed in range(args.seeds)]
            result = {
                "run": run,
                "file": args.file.name,
                "file_sha256": sha256(args.file),
                "sentences": dict(zip(("training", "development", "test"), map(len, parts), strict=True)),
                "test_words": words,
                "tags": tags,
                "majority": sum(sentence.tags.count(most) for sentence in parts[2]) / words,
                "epochs": args.epochs,
                "learning_rate": LEARNING_RATE,
                "batch_size": BATCH_SIZE,
                "scores": scores,
                "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
                "git": git_state(),
                "versions": versions(),
            }
            write_json(folder / f"{run}.json", result)
    results = [json.loads((folder / f"{run}.json").read_text(encoding="utf-8")) for run in labels]
    text = report(results)
    print(text)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(f"Written to {folder}: report.md, {', '.join(result['run'] + '.json' for result in results)}")


if __name__ == "__main__":
    command.run(main)
