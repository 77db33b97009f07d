"""What analyze_kurtosis.py makes of the families of masked language models in transformers, on tiny random ones."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TEXTS, save_tokenizer
from transformers import AutoConfig, AutoModelForMaskedLM

import measurement
from outliers import EMBEDDINGS, LOGITS, PLACES
from quantization import SCHEMES
from report import absent_notes, models_report
from runs import Run

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 130,
}
EVERY = {*PLACES, *EMBEDDINGS, LOGITS}
WHOLE = set(SCHEMES)
REACHED = {"float32", "bfloat16", "w8a8_dynamic", "w4_weight_only"}  # without the attention
NO_PROJECTIONS = {"query", "key", "value"}  # of that name
NO_POST_NORM = {"attention_residual", "attention_layernorm", "ffn_residual", "ffn_layernorm"}
NO_EMBEDDING_NORM = {"embeddings_sum", "embeddings"}

MEASURED = {  # family: (settings besides SIZES, quantizations, places that it lacks)
    "bert": ({}, WHOLE, set()),
    "roberta": ({}, WHOLE, set()),
    "xlm-roberta": ({}, WHOLE, set()),
    "camembert": ({}, WHOLE, set()),
    "electra": ({"embedding_size": 16}, WHOLE, set()),
    "ernie": ({}, WHOLE, set()),
    "data2vec-text": ({}, WHOLE, set()),
    "roc_bert": ({"pronunciation_embed_dim": 8, "shape_embed_dim": 8}, WHOLE, set()),
    "xmod": ({"languages": ["eo"], "default_language": "eo"}, WHOLE, set()),
    "roberta-prelayernorm": ({}, WHOLE, NO_POST_NORM),
    "xlm-roberta-xl": ({}, WHOLE, NO_POST_NORM | NO_EMBEDDING_NORM),
    "deberta": ({}, REACHED, NO_PROJECTIONS),
    "deberta-v2": ({}, REACHED, NO_PROJECTIONS),
    "mpnet": (
        {},
        REACHED,
        NO_PROJECTIONS | {"context", "attention_output", "attention_residual", "attention_layernorm"},
    ),
    "megatron-bert": ({}, REACHED, NO_POST_NORM | NO_EMBEDDING_NORM),
    "big_bird": ({}, REACHED, set()),
    "roformer": ({"embedding_size": 16}, REACHED, set()),
    "layoutlm": ({}, REACHED, set()),
    "rembert": ({"input_embedding_size": 16, "output_embedding_size": 16}, REACHED, set()),
}
SLOW = (
    "xlm-roberta",
    "camembert",
    "ernie",
    "data2vec-text",
    "roc_bert",
    "xmod",
    "xlm-roberta-xl",
    "deberta",
    "rembert",
)
PADDING = "padding changes its logits"
SHAPE = "has no layer.0.output.dense"
REFUSED = {  # family: (settings, reason)
    "longformer": ({"attention_window": [8, 8]}, "does not return one row for every token of a text"),
    "convbert": ({"embedding_size": 16}, PADDING),
    "nystromformer": ({}, PADDING),
    "yoso": ({}, PADDING),
    "fnet": ({}, PADDING),
    "ibert": ({}, "does not return one row for every token of a text"),
    "mobilebert": (
        {"embedding_size": 8, "intra_bottleneck_size": 16, "hidden_size": 32},
        PADDING,
    ),
    "esm": ({"mask_token_id": 4}, "esm.contact_head.regression does not run"),
    "distilbert": ({"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, SHAPE),
    "albert": ({"embedding_size": 16}, SHAPE),
    "modernbert": ({}, SHAPE),
    "squeezebert": ({"embedding_size": 16}, SHAPE),
    "xlm": ({"emb_dim": 16, "n_layers": 2, "n_heads": 2}, SHAPE),
}


def saved(folder, family, settings):
    """A tiny random model of that family, with larger weights than a new model has, and a tokenizer, in `folder`."""
    tokenizer = save_tokenizer(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **{**SIZES, **ids, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) ** 3 * 0.1)
    model.save_pretrained(folder)
    return str(folder)


def measured(folder, family, settings):
    run = Run(family, saved(folder, family, settings), None)
    texts = measurement.Texts(TEXTS, len(TEXTS), TEXTS, TEXTS, 1)
    measurement.measure(run, texts, 2, True, None)
    return run


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (family in SLOW)) for family in MEASURED]
)
def test_families_are_measured_as_far_as_they_allow(tmp_path, family):
    settings, schemes, lacking = MEASURED[family]
    run = measured(tmp_path / family, family, settings)
    assert {name.rpartition(".")[2] for name in run.places} == EVERY - lacking
    assert run.damage["schemes"].keys() == schemes
    assert all(math.isfinite(figures["loss"]) for figures in run.damage["schemes"].values())
    assert bool(run.attention) == (schemes == WHOLE) == bool(run.maps)
    assert set(run.damage["self_check"]) >= {"passed", "class_swap"} and not run.damage["self_check"]["passed"]
    (tmp_path / "text").touch()
    text = models_report([run], absent_notes([run]), len(TEXTS), tmp_path / "text", {}, True)
    assert ("attention, static quantization and what needs them are absent" in text) == (schemes != WHOLE)
    assert ("## Attention" in text) == (schemes == WHOLE)


@pytest.mark.parametrize("family", REFUSED)
def test_families_with_wrong_figures_are_refused_by_name(tmp_path, family):
    settings, reason = REFUSED[family]
    folder = saved(tmp_path / family, family, settings)
    with pytest.raises(SystemExit) as stop:
        measurement.load(folder)
    message = stop.value.code
    assert message.startswith(f"error: {folder} ({family}) ") and reason in message and "\n" not in message


@pytest.mark.parametrize("family", ["deberta-v2", "big_bird"])
def test_activations_outside_the_attention_interface_equal_those_of_unpadded_texts(tmp_path, family):
    run = measured(tmp_path, family, {})
    model, tokenizer = measurement.load(str(tmp_path))
    outputs = []
    model.base_model.encoder.layer[1].output.dense.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    expected = np.mean([scipy.stats.kurtosis(out.double().numpy().ravel()) for out in outputs])
    assert run.places["layer.1.ffn_output"]["kurtosis_sequence"] == pytest.approx(expected, abs=1e-4)
    assert run.tokens == sum(map(len, outputs))
