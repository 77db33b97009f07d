"""The instrument must not know which arm it measures: swapping the class and keeping the function changes no figure.

n = 1e-30 stands for 0: the class of softmax_n models then computes softmax, to rounding. Whatever treats the arms
differently for another reason than their function shows here.
"""

import pytest
import torch
from conftest import save_tokenizer
from test_tag_words import ARCHITECTURE, tagged_lines
from test_train_model import train  # noqa: F401  (a fixture)
from transformers import RobertaConfig, RobertaForMaskedLM

import tag_words
from softmax1 import RobertaSoftmaxNConfig, RobertaSoftmaxNForMaskedLM

ZERO = 1e-30  # as n: exp(0) + ZERO is exp(0) in every format


def test_training_and_all_that_it_records(train):  # noqa: F811
    """Dropout included: both classes draw the same."""
    stock = train("--softmax_n", "0")
    swapped = train("--softmax_n", str(ZERO))
    assert swapped["run"] == "esperberto-softmax1e-30"
    assert stock["model"]["initial_weights"] == swapped["model"]["initial_weights"]
    for history in ("loss_history", "validation_loss_history"):
        for ours, theirs in zip(stock[history], swapped[history], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    for kind in ("weight_excess_kurtosis", "activation_excess_kurtosis"):
        assert stock[kind] == pytest.approx(swapped[kind], rel=1e-3, abs=1e-3, nan_ok=True)
    for ours, theirs in zip(stock["emergence"], swapped["emergence"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)


def test_fine_tuning_on_tagged_words(tmp_path, monkeypatch):
    tokenizer = save_tokenizer(tmp_path / "stock")
    save_tokenizer(tmp_path / "swapped")
    settings = {**ARCHITECTURE, "vocab_size": len(tokenizer)}
    stock = RobertaForMaskedLM(RobertaConfig(**settings, softmax_n=0.0))
    swapped = RobertaSoftmaxNForMaskedLM(RobertaSoftmaxNConfig(**settings, softmax_n=ZERO))
    swapped.load_state_dict(stock.state_dict())
    path = tmp_path / "tagged.conllu"
    path.write_text("\n".join(tagged_lines(30)), encoding="utf-8")
    parts = tag_words.split(tag_words.read_conllu(path))
    monkeypatch.setattr(tag_words, "LEARNING_RATE", 1e-2)
    losses, cross_entropy = {}, torch.nn.functional.cross_entropy
    for name, model in (("stock", stock), ("swapped", swapped)):
        model.save_pretrained(tmp_path / name)
        losses[name] = []

        def spy(*args, kept=losses[name], **kwargs):
            loss = cross_entropy(*args, **kwargs)
            kept.append(loss.item())
            return loss

        monkeypatch.setattr(tag_words.F, "cross_entropy", spy)
        tag_words.fine_tune(str(tmp_path / name), parts, ["ADV", "NOUN", "VERB"], 0, 3, tag_words.tqdm(disable=True))
    assert losses["stock"][0] > 0.9 and losses["stock"] == pytest.approx(losses["swapped"], rel=1e-4)
