import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of a test are so small that threads only wait for each other

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import build_dataset
import train_tokenizer


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Folder with data/ and tokenizer/, made of the embedded sample by the scripts themselves."""
    folder = tmp_path_factory.mktemp("sample")
    data, tokenizer = str(folder / "data"), str(folder / "tokenizer")
    build_dataset.main(["--sample", "--validation_fraction", "0.1", "--output_dir", data])
    train_tokenizer.main(["--data_dir", data, "--output_dir", tokenizer, "--vocab_size", "1024"])
    return folder


# Sizes of a model that computes in a moment; tests add a vocabulary and positions.
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

TEXTS = [
    "La hundo kuras.",
    "Ĉu vi vidas la ruĝan ĝardenon malantaŭ nia malgranda domo?",
    "Jes, mi vidas ĝin ĉiutage, kiam mi iras al la lernejo kun mia frato kaj lia amiko.",
    "Pluvas.",
]


def save_tokenizer(folder):
    """A small byte-level tokenizer, as train_tokenizer.py makes them, saved in `folder`."""
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
