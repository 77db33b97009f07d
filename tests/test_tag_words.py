"""tag_words.py: the CoNLL-U reader, labels on first tokens, and fine-tuning that learns what can be learnt."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_tokenizer
from transformers import AutoModelForTokenClassification, RobertaConfig, RobertaForMaskedLM

import softmax1
import tag_words
from runs import labelled
from tag_words import IGNORED, Sentence, accuracy, batches, encode, read_conllu, report, split

ARCHITECTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}


def row(identifier, form="vorto", tag="NOUN", columns=10):
    return "\t".join([str(identifier), form, "_", tag, *["_"] * (columns - 4)])


@pytest.fixture
def conllu(tmp_path):
    """Writes a CoNLL-U file of lines."""

    def write(*lines):
        path = tmp_path / "tagged.conllu"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


# ------------------------------------------------------------------------------------------------------------- CoNLL-U


def test_comments_ranges_and_empty_nodes(conllu):
    path = conllu(
        "# sent_id = 1",
        "# text = Ne ĉagrenu nin.",
        row("1-2", "Neĉagrenu", "_"),
        row(1, "Ne", "PART"),
        row(2, "ĉagrenu", "VERB"),
        row("2.1", "estas", "AUX"),
        row(3, "nin", "PRON", columns=11),
        row(4, "?", "_"),
        "",
        "",
        "# a comment alone",
        "",
        row(1, "Fino", "NOUN"),
    )
    assert read_conllu(path) == [
        Sentence(["Ne", "ĉagrenu", "nin"], ["PART", "VERB", "PRON"]),
        Sentence(["Fino"], ["NOUN"]),
    ]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["# x", row(1), "2 hundo NOUN"], "line 3: 1 columns between tabs"),
        ([row(1), row(2, columns=9)], "line 2: 9 columns between tabs"),
        ([row(1), row(3)], "line 2: word number '3' after 1"),
        ([row(2)], "line 1: word number '2' after 0"),
        ([row(1), "", row(2)], "line 3: word number '2' after 0"),
        ([row("a")], "line 1: word number 'a'"),
        ([row(1, " ")], "line 1: an empty form or tag"),
        ([row(1, tag="")], "line 1: an empty form or tag"),
    ],
)
def test_malformed_lines_are_named(conllu, lines, said):
    with pytest.raises(SystemExit) as stop:
        read_conllu(conllu(*lines))
    assert stop.value.code.startswith("error: ") and said in stop.value.code and "\n" not in stop.value.code


def test_a_line_ends_where_the_file_says(tmp_path):
    """Not at U+2028 and its like; and a carriage return before its end is no part of a line."""
    path = tmp_path / "tagged.conllu"
    words = "La\u2028 hundo", "\x85kuras", "for\x0c"
    lines = ["# text = unu\u2028du", *(row(i, word) for i, word in enumerate(words, 1)), "", row(1, "Fino"), ""]
    path.write_bytes("\r\n".join(lines).encode())
    assert [sentence.words for sentence in read_conllu(path)] == [list(words), ["Fino"]]
    path.write_bytes("\r\n".join([*lines, row(1, columns=9)]).encode())
    with pytest.raises(SystemExit, match="line 8: 9 columns"):
        read_conllu(path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes("ĝis".encode("utf-16"))
    for path in (tmp_path / "none", tmp_path / "latin"):
        with pytest.raises(SystemExit, match="cannot be read"):
            read_conllu(path)


def test_the_split_is_fixed_and_loses_nothing():
    sentences = [Sentence([str(i)], ["X"]) for i in range(50)]
    parts = split(sentences)
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted(int(one.words[0]) for part in parts for one in part) == list(range(50))
    assert parts == split(sentences) and parts[0] != sentences[:40]


# -------------------------------------------------------------------------------------------------------------- labels


def test_the_first_token_of_a_word_carries_its_tag(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    sentence = Sentence(["La", "ĝardenoj", "!"], ["DET", "NOUN", "X"])
    ids, labels = encode(sentence, tokenizer, ["DET", "NOUN"])
    assert ids == tokenizer("La ĝardenoj !")["input_ids"]  # as running text
    assert len(ids) == len(labels) and labels[0] == labels[-1] == IGNORED
    assert [label for label in labels if label != IGNORED] == [0, 1, 2]  # 2: a tag that training never had
    first = len(tokenizer("La", add_special_tokens=False)["input_ids"])
    assert labels[1] == 0 and labels[1 + first] == 1
    tokenizer.model_max_length = 6
    short = encode(sentence, tokenizer, ["DET", "NOUN"])
    assert len(short[0]) == len(short[1]) == 6 and short[0][-1] == 2


class Guesses(torch.nn.Module):
    """Predicts the tag that each token's id says."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": torch.nn.functional.one_hot(input_ids, 9).float()})


def test_accuracy_counts_words_only():
    some = batches([([0, 3, 4, 5, 2], [IGNORED, 3, IGNORED, 4, IGNORED]), ([0, 1, 2], [IGNORED, 1, IGNORED])], pad=1)
    assert accuracy(Guesses(), some) == pytest.approx(2 / 3)
    assert some[0]["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


# ---------------------------------------------------------------------------------------------------------- end to end


def tagged_lines(count):
    """Words whose ending tells the tag, as in Esperanto."""
    endings = {"o": "NOUN", "as": "VERB", "e": "ADV"}
    stems = ["hund", "kat", "vid", "bon", "rapid"]
    lines = []
    for i in range(count):
        for j, (ending, tag) in enumerate(endings.items()):
            lines.append(row(j + 1, stems[(i + j) % 5] + ending, tag))
        lines.append("")
    return lines


def save_stock(folder):
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=len(tokenizer))).save_pretrained(folder)


def test_two_arms_are_fine_tuned_scored_and_compared(conllu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tag_words, "LEARNING_RATE", 1e-2)  # a small random model learns in a few steps
    for name in ("esperberto-softmax0", "esperberto-softmax1"):  # both stock: the arms are told apart by name
        save_stock(tmp_path / "models" / name)
    folders = ["--models_dir", str(tmp_path / "models"), "--results_dir", str(tmp_path / "results")]
    tag_words.main([str(conllu(*tagged_lines(60))), *folders, "--seeds", "2", "--epochs", "12"])
    printed = capsys.readouterr().out
    for name in ("esperberto-softmax0", "esperberto-softmax1"):
        result = json.loads((tmp_path / "results" / "tagging" / f"{name}.json").read_text())
        assert result["sentences"] == {"training": 48, "development": 6, "test": 6} and result["test_words"] == 18
        assert [score["seed"] for score in result["scores"]] == [0, 1]
        assert all(score["test"] > 0.9 for score in result["scores"]), result["scores"]
        assert result["majority"] == pytest.approx(1 / 3)
        assert f"| {name} | " in printed
    assert "esperberto-softmax1 over esperberto-softmax0: " in printed and "one pair: no interval" in printed
    assert (tmp_path / "results" / "tagging" / "report.md").read_text() in printed


def test_models_in_folders_of_the_same_name_are_told_apart(conllu, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in ("a", "b"):
        save_stock(tmp_path / parent / "final")
    tag_words.main([str(conllu(*tagged_lines(20))), "a/final", "./b/final/", "--seeds", "1", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert sorted(path.stem for path in Path("results/tagging").glob("*.json")) == ["a--final", "b--final"]
    assert "| a--final | " in printed and "| b--final | " in printed
    assert labelled(["a/final", "you/final", "you/other"]) == ["a--final", "you--final", "other"]
    monkeypatch.chdir(tmp_path / "a" / "final")
    assert labelled([".", "../../b", "you/bert"]) == ["final", "b", "bert"]
    with pytest.raises(SystemExit, match=r"a/final and \./a/final have the same name"):
        labelled(["a/final", "./a/final"])


def test_our_arm_is_fine_tuned_with_its_own_attention(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    config = softmax1.RobertaSoftmaxNConfig(**ARCHITECTURE, vocab_size=len(tokenizer), softmax_n=2.0)
    softmax1.RobertaSoftmaxNForMaskedLM(config).save_pretrained(tmp_path)
    model, _ = tag_words.load(str(tmp_path), ["A", "B"])
    assert isinstance(model, softmax1.RobertaSoftmaxNForTokenClassification)
    assert model.config.softmax_n == 2.0 and model.config._attn_implementation == "softmax_n"
    assert isinstance(model, type(AutoModelForTokenClassification.from_pretrained(tmp_path)))


def test_the_report_has_an_interval_over_training_seeds():
    def result(run, accuracies):
        scores = [{"test": one, "development": one} for one in accuracies]
        sentences = {"training": 8, "development": 1, "test": 1}
        return {"run": run, "scores": scores, "file": "f", "sentences": sentences, "test_words": 9, "epochs": 1} | {
            "majority": 0.5
        }

    text = report(
        [
            result("esperberto-softmax0", [0.90, 0.92]),
            result("esperberto-softmax0-seed43", [0.92, 0.92]),
            result("esperberto-softmax1", [0.93, 0.93]),
            result("esperberto-softmax1-seed43", [0.93, 0.93]),
        ]
    )
    assert "| esperberto-softmax0 | 91.00 ± 1.41 |" in text
    assert "+1.50 percentage points (95% interval -4.85 to +7.85" in text and "n = 2" in text


def edited(folder, name, change):
    file = folder / name
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def infinite(folder):
    model = RobertaForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.roberta.encoder.layer[0].output.dense.bias[0] = torch.nan
    model.save_pretrained(folder)


def circle(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def small_model(folder):
    RobertaForMaskedLM(RobertaConfig(**ARCHITECTURE, vocab_size=100)).save_pretrained(folder)


BAD_MODELS = {
    "tokenizer larger than the model": (small_model, "entries, the model 100"),
    "tokenizer of an unknown type": (
        lambda folder: edited(folder, "tokenizer.json", lambda tokenizer: tokenizer["model"].update(type="Unheard")),
        "does not load",
    ),
    "tokenizer without a start": (
        lambda folder: edited(
            folder, "tokenizer_config.json", lambda one: [one.pop("bos_token"), one.pop("cls_token", 0)]
        ),
        "no padding, start or end token",
    ),
    "weights that are no numbers": (infinite, "its weights hold NaN or infinities"),
    "config values of the wrong kind": (
        lambda folder: edited(folder, "config.json", lambda config: config.update(hidden_size=[16])),
        "does not load",
    ),
    "config nested too deep": (
        lambda folder: (folder / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000),
        "does not load",
    ),
    "a link in a circle": (circle, "that is a file, or a link that leads nowhere"),
    "weights of another size": (
        lambda folder: edited(folder, "config.json", lambda config: config.update(num_hidden_layers=2)),
        "its weights are not complete: it lacks roberta.encoder.layer.1.",
    ),
    "fewer layers than the weights": (
        lambda folder: edited(folder, "config.json", lambda config: config.update(num_hidden_layers=-1)),
        "config.json has fewer layers than the weights, which hold roberta.encoder.layer.0.",
    ),
}


@pytest.mark.parametrize("damage", BAD_MODELS)
def test_a_model_that_cannot_be_fine_tuned_is_refused_before_the_first_is(conllu, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tag_words, "fine_tune", lambda *_: pytest.fail("fine-tuned"))
    spoil, said = BAD_MODELS[damage]
    save_stock(tmp_path / "good")
    save_stock(tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(SystemExit) as stop:
        tag_words.main([str(conllu(*tagged_lines(20))), str(tmp_path / "good"), str(tmp_path / "bad")])
    message = stop.value.code
    assert message.startswith("error: ") and said in message and "\n" not in message


def test_sentences_are_cut_where_the_models_positions_end(tmp_path):
    save_stock(tmp_path)
    edited(tmp_path, "tokenizer_config.json", lambda settings: settings.update(model_max_length=10**30))
    _, tokenizer = tag_words.load(str(tmp_path), ["A"])
    ids, labels = encode(Sentence(["vorto"] * 500, ["A"] * 500), tokenizer, ["A"])
    assert len(ids) == len(labels) == 128  # of 130 positions RoBERTa uses all but two


def test_help_has_the_examples_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        tag_words.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and tag_words.__doc__.strip() in shown and "(20)" in shown.partition("--epochs")[2]


def test_bad_input_ends_in_one_line(conllu, tmp_path, capsys):
    with pytest.raises(SystemExit, match="too few sentences"):
        tag_words.main([str(conllu(row(1)))])
    path = str(conllu(*tagged_lines(20)))
    with pytest.raises(SystemExit, match="no models in"):
        tag_words.main([path, "--models_dir", str(tmp_path / "none")])
    save_stock(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SystemExit, match="cannot be fine-tuned"):
        tag_words.main([path, str(tmp_path / "model")])
    with pytest.raises(SystemExit) as stop:
        tag_words.main([path, "--seeds", "0"])
    assert stop.value.code == 2
    done = subprocess.run(
        [sys.executable, tag_words.__file__, path, str(tmp_path / "nobody")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"error: no model folder {tmp_path}/nobody"
    assert not (Path(tmp_path) / "results").exists()
    save_stock(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"nothing can be written to .*tagging \(Not a directory\)"):
        tag_words.main([path, str(tmp_path / "model"), "--results_dir", str(tmp_path / "file")])
