"""What several test files share: the data and tokenizer of the sample, and small models, tokenizers and trainings."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models as small as these, several threads are slower

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import build_dataset
import experiment
import train_model
import train_tokenizer


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with data/ and tokenizer/, which the scripts made from the embedded sample."""
    folder = tmp_path_factory.mktemp("sample")
    data, tokenizer = str(folder / "data"), str(folder / "tokenizer")
    build_dataset.main(["--sample", "--validation_fraction", "0.1", "--output_dir", data])
    train_tokenizer.main(["--data_dir", data, "--output_dir", tokenizer, "--vocab_size", "1024"])
    return folder


# Sizes of a model that is computed in a moment. Tests add the vocabulary and the positions.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

# The architecture of the fixture `train`, instead of the published one.
ARCHITECTURE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}

# The value of --config_overrides for an even smaller one.
OVERRIDES = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=34"


def as_flags(**settings) -> list[str]:
    """Flags of a command line: as_flags(max_steps=6) is ["--max_steps", "6"]."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def train(sample, tmp_path, monkeypatch):
    """train("--flag", ...) trains a small model below tmp_path with train_model.py, and returns its results."""
    monkeypatch.setattr(experiment, "ARCHITECTURE", ARCHITECTURE)
    monkeypatch.chdir(tmp_path)

    def run(*flags, steps=6, results="results"):
        places = as_flags(data_dir=sample / "data", tokenizer_dir=sample / "tokenizer", results_dir=results)
        sizes = as_flags(max_steps=steps, per_device_train_batch_size=4, max_length=64, vocab_size=1024)
        events = as_flags(logging_steps=1, eval_steps=3, save_steps=3, max_eval_samples=20, disable_tqdm="true")
        train_model.main([*places, *sizes, *events, "--output_dir", f"{results}-models/<run>", *flags])
        newest = max(Path(results).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text(encoding="utf-8"), parse_constant=pytest.fail)

    return run


TEXTS = [
    "La hundo kuras.",
    "Ĉu vi vidas la ruĝan ĝardenon malantaŭ nia malgranda domo?",
    "Jes, mi vidas ĝin ĉiutage, kiam mi iras al la lernejo kun mia frato kaj lia amiko.",
    "Pluvas.",
]


def save_tokenizer(folder):
    """Save a small byte-level tokenizer like those of train_tokenizer.py in `folder`, and return it."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), specials, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=128, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer
