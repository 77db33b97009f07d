"""The training text: reads the dataset and the tokenizer, and tokenizes the dataset once for all runs."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

from datasets import DatasetDict, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import record
from folder import locked


def load_data(path: str) -> tuple[DatasetDict, dict]:
    """The dataset of build_dataset.py and its manifest. Exits with one line if it is missing or damaged."""
    try:
        manifest = record.read_json(Path(path) / "manifest.json")
        data = load_from_disk(path)
        data["train"], data["validation"], manifest["splits"]["train"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"error: {path} holds no complete dataset ({record.one_line(error)}): run build_dataset.py first")
    for name in ("train", "validation"):
        split = data[name]
        if "text" not in split.column_names or split.features["text"].dtype not in ("string", "large_string"):
            sys.exit(f"error: the {name} split in {path} has no column `text` of strings: run build_dataset.py")
        if split.data.column("text").null_count:
            sys.exit(f"error: the {name} split in {path} has samples without a text: run build_dataset.py again")
    return data, manifest


def load_tokenizer(path: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of train_tokenizer.py. Exits with one line if it is missing, damaged or too large."""
    if not (Path(path) / "tokenizer.json").is_file():
        sys.exit(f"error: {path} holds no tokenizer: run train_tokenizer.py first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged tokenizer.json
        sys.exit(
            f"error: the tokenizer in {path} cannot be read ({record.one_line(error)}): run train_tokenizer.py again"
        )
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id != 1:
        sys.exit(f"error: the tokenizer in {path} needs a <mask> token and <pad> as id 1, as RoBERTa has them")
    if len(tokenizer) > vocab_size:
        sys.exit(f"error: the tokenizer has {len(tokenizer):,} entries, more than --vocab_size {vocab_size:,}")
    return tokenizer


def tokenized(data: DatasetDict, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """The dataset as `input_ids`, tokenized by the first run that needs it and read from `folder` by the others.

    Args:
        data: splits with a `text` column, one sample in each row.
        folder: of the tokenized dataset; its name must differ for other data, another tokenizer or another length.
        tokenizer: adds <s> and </s>.
        max_length: the most tokens of a sample, <s> and </s> included.

    Raises:
        SystemExit: with one line, if the folder is damaged.
    """
    if not folder.exists():
        with locked(folder):  # if several runs start at the same time, one tokenizes
            if not folder.exists():
                _tokenize(data, folder, tokenizer, max_length)
    try:
        loaded = load_from_disk(folder)
        if any(len(loaded[name]) != len(split) for name, split in data.items()):
            raise ValueError("it does not have the samples of the dataset")
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"error: {folder} is damaged ({record.one_line(error)}): delete that folder, it is made again")
    return loaded


def _tokenize(data: DatasetDict, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Write the tokenized dataset next to `folder`, then rename it."""
    tokenizer = copy.deepcopy(tokenizer)  # truncation changes a setting of it, which would be saved with the model

    def tokenize(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, return_attention_mask=False)
        return {"input_ids": encoded["input_ids"]}

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    cache = {split: str(partial / "cache" / f"{split}.arrow") for split in data}
    (partial / "cache").mkdir(parents=True)
    result = data.map(tokenize, batched=True, remove_columns=["text"], cache_file_names=cache, desc="Tokenizing")
    result.save_to_disk(partial)
    shutil.rmtree(partial / "cache")
    partial.rename(folder)
