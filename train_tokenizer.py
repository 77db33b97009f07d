"""Train the tokenizer: byte-level BPE on the training split, saved as RoBERTa's tokenizer.

    python train_tokenizer.py

Reads data/ (build_dataset.py). Writes tokenizer/, which AutoTokenizer and RobertaTokenizerFast load, and
tokenizer/manifest.json. The same text gives the same bytes with any number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
import unicodedata
from collections.abc import Callable

import command

if __name__ == "__main__":
    command.begin()

from datasets import Dataset
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import RobertaTokenizer

import folder
import record
from corpus import load_data
from experiment import MAX_LENGTH, VOCAB_SIZE

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4: RoBERTa expects <pad> to be 1
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256  # every byte has an entry, so that every text can be encoded
LARGEST = 1 << 24  # a larger --vocab_size or --min_frequency is a typing error, and would fill the memory
BATCH_TEXTS = 1_000

# Texts that decoding must restore exactly. (A text that contains the name of a special token cannot be restored.)
HARD_TEXTS = [
    "Eĥoŝanĝo ĉiuĵaŭde: ĈĜĤĴŜŬ ĉĝĥĵŝŭ!",
    unicodedata.normalize("NFD", "Eĥoŝanĝo ĉiuĵaŭde, naïve café"),  # letters followed by combining accents
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺",  # joiners, variation selectors, skin tones, flags
    "\ttabulo\t\tdu\n\nnovaj linioj\r\n kaj  du   spacoj  ",
    "spaco antaŭ , kaj post . n't 's ( krampoj ) « citilo » „alia” — streko…",
    "Съешь ещё этих мягких французских булок",
    "我能吞下玻璃而不伤身体。 ひらがな カタカナ 한국어",
    "أنا قادر على أكل الزجاج שלום עולם हिन्दी ไทย",
    "\x01\x07\x1b[0m\x7f\x85\xa0\u200b\u200e\u2028\ufeff\ufffd\U0010ffff",
    "https://eo.wikipedia.org/wiki/Ĉefpaĝo?a=1&b=%20#x  3,14 × 10⁻³ <b>",
    " ",
    "",
]

# The files in a complete tokenizer/.
OURS = ("manifest.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(description=__doc__)
    parser.add_argument("--data_dir", default="data", help="dataset of build_dataset.py (%(default)s)")
    parser.add_argument("--output_dir", default="tokenizer", help="tokenizer to write (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer that is there")
    parser.add_argument("--keep", action="store_true", help="keep a tokenizer that was made with the same flags")
    entries, pairs = command.whole_number(SMALLEST_VOCAB, LARGEST), command.whole_number(1, LARGEST)
    parser.add_argument("--vocab_size", type=entries, default=VOCAB_SIZE, help="entries at most (%(default)s)")
    parser.add_argument("--min_frequency", type=pairs, default=2, help="how often a merged pair occurs (%(default)s)")
    return parser.parse_args(argv)


def train(dataset: Dataset, vocab_size: int, min_frequency: int) -> RobertaTokenizer:
    """Byte-level BPE. The order of its entries: special tokens, bytes, merges."""
    bpe = ByteLevelBPETokenizer()
    interruptible(
        lambda: bpe.train_from_iterator(
            (batch["text"] for batch in dataset.iter(BATCH_TEXTS)),
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=sys.stderr.isatty(),  # in a log file these bars are empty lines
            special_tokens=SPECIAL_TOKENS,
            length=len(dataset),
        )
    )
    model = json.loads(bpe.to_str())["model"]
    # RobertaTokenizerFast is the older name of this class (in transformers 5.0 to 5.2 the name is a broken leftover).
    # The class sets RoBERTa's templates, <s> A </s> and <s> A </s></s> B </s>. Only RoBERTa's <mask> has to be defined
    # here: it includes the space before it, so "saluton <mask>" and "saluton mondo" have equally many tokens.
    return RobertaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        mask_token=AddedToken("<mask>", lstrip=True, normalized=False, special=True),
        add_prefix_space=False,
        trim_offsets=True,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def interruptible(work: Callable[[], None]) -> None:
    """Call work() in a daemon thread, so that Ctrl-C ends the script immediately, and raise what it raises.

    In the main thread the tokenizers library would not react to Ctrl-C before it has finished.
    """
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def do() -> None:
        try:
            work()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=do, daemon=True).start()
    if (error := ended.get()) is not None:
        raise error


def check(tokenizer: RobertaTokenizer) -> None:
    """Exit unless the special tokens have their ids and decoding restores every text of HARD_TEXTS."""
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    if ids != list(range(len(SPECIAL_TOKENS))):
        sys.exit(f"error: the special tokens {' '.join(SPECIAL_TOKENS)} have the ids {ids}: nothing is saved")
    for text in HARD_TEXTS:
        decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        if decoded != text:
            sys.exit(f"error: the tokenizer turns {text!r} into {decoded!r}: nothing is saved")


def measure(tokenizer: RobertaTokenizer, dataset: Dataset) -> tuple[float, float]:
    """(tokens per word, tokens per text), without <s> and </s>. Words are separated by white space."""
    words = tokens = 0
    total = math.ceil(len(dataset) / BATCH_TEXTS)
    for batch in tqdm(dataset.iter(BATCH_TEXTS), desc="measuring", unit=" batches", total=total):
        texts = batch["text"]
        words += sum(len(text.split()) for text in texts)
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens += sum(len(ids) for ids in encoded["input_ids"])
    return tokens / words, tokens / len(dataset)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    data, data_manifest = load_data(args.data_dir)
    settings = {
        "vocab_size": args.vocab_size,
        "min_frequency": args.min_frequency,
        "data_sha256": data_manifest["splits"]["train"]["sha256"],
    }
    if args.keep and folder.kept(args.output_dir, settings):
        return
    if not any(text.strip() for batch in data["validation"].iter(BATCH_TEXTS) for text in batch["text"]):
        sys.exit(f"error: the validation split in {args.data_dir} holds nothing but white space: build the data again")
    with folder.replacing(args.output_dir, OURS, args.overwrite) as output:
        tokenizer = train(data["train"], args.vocab_size, args.min_frequency)
        check(tokenizer)
        try:
            tokenizer.save_pretrained(output)
        except Exception as error:  # the tokenizers library raises a bare Exception even for a full disk
            sys.exit(f"error: the tokenizer cannot be written to {args.output_dir} ({error})")
        check(RobertaTokenizer.from_pretrained(output))
        tokens_per_word, tokens_per_text = measure(tokenizer, data["validation"])
        manifest = {
            "format": 1,
            "argv": record.command_line(),
            **settings,
            "entries": len(tokenizer),
            "tokens_per_word": tokens_per_word,
            "tokens_per_text": tokens_per_text,
            "sha256": record.sha256(output / "tokenizer.json"),
        }
        record.write_json(output / "manifest.json", manifest)
    if len(tokenizer) < args.vocab_size:
        print(
            f"note: {len(tokenizer):,} entries instead of {args.vocab_size:,}: no other pair occurs at least "
            f"{args.min_frequency} times in this text"
        )
    print(
        f"{args.output_dir}: {len(tokenizer):,} entries, {tokens_per_word:.2f} tokens per word and "
        f"{tokens_per_text:.1f} per text on {len(data['validation']):,} validation texts"
    )


if __name__ == "__main__":
    command.run(main)
