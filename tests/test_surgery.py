"""apply_softmax_n on models of many families: sinks of their own, learned ones, and what it must refuse or keep."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipConfig,
    SiglipModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

import softmax1
from softmax1 import apply_softmax_n

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"initializer_range": 0.2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})).eval()


def batch(padded=True):
    input_ids = torch.randint(5, 99, (2, 13), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, :5] = 0  # on the left, as for generation
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or batch())).logits


# ---------------------------------------------------------------------------------------------- sinks of their own

HAVE_SINKS = ["gpt_oss", "granite_swa", "granitemoe_swa", "flint", "openai_privacy_filter", "deepseek_v4", "hy_v4"]
HAVE_SINKS += ["mimo_v2_flash"]


def model_with_sinks(name):
    """A tiny model with random sinks that take from 5 to 95 % of the mass, and its own eager attention."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    settings = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    settings |= {"max_position_embeddings": 64, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    if name == "flint":
        settings |= {"moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4}
    if name == "hy_v4":  # each query is confined to few keys
        settings["index_topk"] = 4
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = CONFIG_MAPPING[name](**settings, **implementations)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
    torch.manual_seed(0)
    model = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_(1.0, 2.0)
    return model


def outputs_and_gradients(model):
    inputs = batch()
    real = inputs["attention_mask"][..., None]
    model.zero_grad()
    output = model(**inputs).logits * real
    output.square().sum().backward()
    return output.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HAVE_SINKS)
def test_sinks_of_its_own_are_honoured(name):
    """In float64, where nothing but the order of additions differs, unless the model computes in float32 itself."""
    stock = model_with_sinks(name)
    if "granite" not in name:  # whose own attention is NaN in float64, where padding is on the left
        stock = stock.double()
    ours = apply_softmax_n(copy.deepcopy(stock))
    assert ours.config._attn_implementation == ("softmax_n_additive" if name == "deepseek_v4" else "softmax_n")
    (expected, gradients), (found, our_gradients) = outputs_and_gradients(stock), outputs_and_gradients(ours)
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert gradients.keys() == our_gradients.keys() and any(key.endswith("sinks") for key in gradients)
    for key, gradient in gradients.items():
        close = {"rtol": 1e-3, "atol": 1e-4 * gradient.abs().max().item()}
        assert_close(our_gradients[key], gradient, **close, msg=lambda text, key=key: f"{key}: {text}")
        assert gradient.abs().max() > 0 or not key.endswith("sinks")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_gpt_oss_generates_with_its_sinks(cache):
    stock = model_with_sinks("gpt_oss")
    ours = apply_softmax_n(copy.deepcopy(stock))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    expected = stock.generate(**batch(), **options)
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    assert torch.equal(ours.generate(**batch(), **options), expected)
    with torch.no_grad():  # the sinks decide: without them other tokens come
        for name, parameter in ours.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-30.0)
    assert not torch.equal(ours.generate(**batch(), **options), expected)


@pytest.mark.filterwarnings("ignore")
def test_gpt_oss_trains_with_its_sinks():
    stock = model_with_sinks("gpt_oss")
    ours = apply_softmax_n(copy.deepcopy(stock))
    losses = []
    for model in (stock, ours):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
        before = model.model.layers[0].self_attn.sinks.detach().clone()
        for _ in range(4):
            loss = model(**batch(padded=False), labels=batch()["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert (model.model.layers[0].self_attn.sinks - before).abs().min() > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gpt_oss_shows_weights_and_comes_back_as_it_was(tmp_path):
    stock = model_with_sinks("gpt_oss")
    ours = apply_softmax_n(copy.deepcopy(stock))
    with torch.no_grad():
        shown = ours(**batch(), output_attentions=True).attentions
        expected = stock(**batch(), output_attentions=True).attentions
    assert len(shown) == 4
    assert_close(shown[3][0], expected[3][0], rtol=1e-3, atol=1e-5)
    ours.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    assert_close(logits(again)[0], logits(stock)[0])
    with pytest.raises(ValueError, match=r"has attention sinks of its own: take them, apply_softmax_n\(model\)"):
        apply_softmax_n(stock, 1.0)
    assert stock.config._attn_implementation == "eager" and not hasattr(stock.config, "softmax_n")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention sinks of its own: give n, or 'learned'"):
        apply_softmax_n(llama())


# ------------------------------------------------------------------------------------------- learned, saved and loaded


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SMALL)).eval()


def roberta():
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=66, type_vocab_size=1)).eval()


def softmax_n_roberta(n):
    torch.manual_seed(0)
    config = softmax1.RobertaSoftmaxNConfig(**SMALL, softmax_n=n, max_position_embeddings=66, type_vocab_size=1)
    return softmax1.RobertaSoftmaxNForMaskedLM(config).eval()


def test_learned_sinks_start_at_softmax1_and_learn():
    model, softmax1_model = apply_softmax_n(llama(), "learned"), apply_softmax_n(llama(), 1.0)
    assert_close(logits(model), logits(softmax1_model))
    sinks = [parameter for name, parameter in model.named_parameters() if name.endswith("self_attn.log_n")]
    assert len(sinks) == 2 and all(parameter.shape == (4,) for parameter in sinks)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in sinks)
    apply_softmax_n(model, 1.0)
    assert not any("log_n" in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [2.0, "learned"])
@pytest.mark.parametrize("build", [llama, bert, gpt2, roberta])
def test_comes_back_with_its_n_or_not_at_all(tmp_path, build, n):
    stock = build()
    model = apply_softmax_n(copy.deepcopy(stock), n)
    assert isinstance(model, type(stock)) and type(stock) is type(build())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_n"):
                parameter.normal_(0, 2)
    expected = logits(model)
    assert (expected - logits(stock)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="silently make it a softmax model"):
        model.set_attn_implementation("sdpa")
    model.config._attn_implementation = "sdpa"  # past the method
    assert torch.equal(logits(model), expected)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)
    auto = AutoModelForCausalLM if build in (llama, gpt2) else transformers.AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert again.config.softmax_n == n and torch.equal(logits(again), expected)
    for options in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}):
        with pytest.raises((KeyError, ValueError)):
            type(stock).from_pretrained(tmp_path, **options)
    with pytest.raises(RuntimeError, match='"softmax_n"'):
        stock.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())
    if n != "learned":
        model.load_state_dict(stock.state_dict())
    assert torch.equal(logits(model), expected)
    apply_softmax_n(model, 0)
    assert type(model) is type(stock)
    assert_close(logits(model), logits(stock))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [bert, roberta, lambda: softmax_n_roberta(1.0)], ids=["bert", "roberta", "ours"])
def test_trained_sinks_are_kept_or_taken_out_but_not_reset(build):
    model = apply_softmax_n(build(), "learned")
    for parameter in softmax1.learned_sinks(model).values():
        nn.init.normal_(parameter, std=2.0)
    expected, kind = logits(model), type(model)
    assert torch.equal(logits(apply_softmax_n(model, "learned")), expected) and type(model) is kind
    apply_softmax_n(model, 2.0)
    assert not softmax1.learned_sinks(model) and not hasattr(model.config, "softmax_n_heads")
    assert torch.equal(logits(model), logits(apply_softmax_n(build(), 2.0)))
    apply_softmax_n(model, "learned")
    assert torch.equal(logits(model), logits(apply_softmax_n(build(), "learned")))  # n = 1 again


def test_softmax_stays_a_stock_model(tmp_path):
    model = apply_softmax_n(llama(), 0)
    assert type(model) is LlamaForCausalLM and type(model.config) is LlamaConfig
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")), logits(llama()))


# --------------------------------------------------------------------------------------- what is found out by running


def bart():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 99}
    return BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=32, init_std=0.3))


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 99}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 16, "max_target_positions": 16, "init_std": 0.3, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes))


def wav2vec2():
    sizes = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 40], "num_feat_extract_layers": 2}
    settings = {key: SMALL[key] for key in SMALL if key.endswith("size") or key.startswith("num") or "range" in key}
    return Wav2Vec2Model(
        Wav2Vec2Config(**settings, **sizes, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [bart, whisper, wav2vec2])
def test_a_model_that_promises_nothing_is_taken_if_it_stands_the_test(build):
    torch.manual_seed(0)
    stock = build().eval()
    assert not stock._supports_attention_backend
    inputs = softmax1._made_up_inputs(stock, everything=False)
    softmax0, softmax9 = (apply_softmax_n(copy.deepcopy(stock), n) for n in (0.0, 9.0))
    with torch.no_grad():
        outputs = [model(**inputs)[0] for model in (stock, softmax0, softmax9)]
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


def siglip():
    text = {**SMALL, "max_position_embeddings": 16}
    vision = {
        key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}))


class SecondAttention(LlamaForCausalLM):
    """Attends once more, by hand, before its head."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        output = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        scores = output.logits @ output.logits.transpose(1, 2) / 30
        output.logits = nn.functional.dropout(scores.softmax(-1), 0.0) @ output.logits
        return output


def state(model):
    parts = [module for module in model.modules() if hasattr(module, "config")]
    return [(type(part), id(part.config), part.config.to_dict(), part.config._attn_implementation) for part in parts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "n", "said"),
    [
        (siglip, 1.0, r"SiglipModel does not take .* in vision_model\.head\.attention"),
        (lambda: SecondAttention(llama().config), 1.0, "SecondAttention does not take .* in SecondAttention"),
        (
            lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SMALL)),
            1.0,
            "DebertaV2ForMaskedLM does not take its attention",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)), 1.0, "has no `softcap`"),
        (llama, -1.0, "finite real number"),
        (llama, "lerned", "finite real number"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_taken_is_refused_and_left_as_it_was(build, n, said, wrapped):
    torch.manual_seed(0)
    model = build()
    whole = nn.DataParallel(nn.Sequential(model)) if wrapped else model
    before = state(whole)
    with pytest.raises(ValueError, match=said):
        apply_softmax_n(whole, n)
    assert state(whole) == before


@pytest.mark.filterwarnings("ignore")
def test_what_was_not_tried_is_watched_when_it_first_runs():
    vision = {**siglip().config.vision_config.to_dict(), "model_type": "siglip_vision_model"}
    text = LlamaConfig(**SMALL, num_key_value_heads=2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    ).eval()
    apply_softmax_n(model, 1.0)  # on text alone
    logits(model, input_ids=torch.tensor([[5, 6, 7]]))
    inputs = {"input_ids": torch.tensor([[5, 98, 98, 98, 98, 6]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"attends with softmax in .*head\.attention"):
        logits(model, **inputs)


def test_a_wrapped_model_and_one_that_shares_its_config():
    config = llama().config
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before = logits(other)
    wrapper = nn.DataParallel(one)
    assert apply_softmax_n(wrapper, 1.0) is wrapper and one.config.softmax_n == 1.0
    assert one.model.config is one.config and one.model.layers[0].self_attn.config is one.config
    assert not hasattr(config, "softmax_n") and other.config is config
    assert torch.equal(logits(other), before)


def test_the_test_leaves_no_traces():
    model, seen = llama(attention_dropout=0.1).train(), []
    model.model.layers[0].eval()
    model.model.register_forward_hook(lambda *args: seen.append(1))
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    apply_softmax_n(model, 1.0)
    assert not seen and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    logits(model)
    assert seen


def test_an_old_transformers_is_told_so(monkeypatch):
    monkeypatch.setattr(softmax1.transformers, "__version__", "4.57.1")
    for call in (lambda: apply_softmax_n(llama(), 1.0), lambda: softmax1.RobertaSoftmaxNConfig()):
        with pytest.raises(ImportError, match=r"softmax_n models need transformers 5\.0 or later, found 4\.57\.1"):
            call()


# ------------------------------------------------------------------------------------------------ RoBERTa's classes


@pytest.mark.parametrize("auto", softmax1.MODELS, ids=lambda auto: auto.__name__)
def test_every_class_of_roberta_keeps_its_n(tmp_path, auto):
    torch.manual_seed(0)
    config = softmax1.RobertaSoftmaxNConfig(**SMALL, softmax_n=3.0, max_position_embeddings=66, type_vocab_size=1)
    model = auto.from_config(config).eval()
    assert type(model) is softmax1.MODELS[auto]
    ids = batch()["input_ids"][None] if "MultipleChoice" in auto.__name__ else batch()["input_ids"]
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(ids)[0], model(ids)[0])
        apply_softmax_n(again, 0.1)
        assert (again(ids)[0] - model(ids)[0]).abs().max() > 1e-4
    kinds = set(json.loads((tmp_path / "config.json").read_text())["auto_map"])
    assert {"AutoConfig", auto.__name__} <= kinds


def test_the_model_of_a_third_arm(tmp_path):
    """Learned sinks in the class of the experiment: same initial weights, n = 1 at first, saved and loaded."""
    settings = {**SMALL, "max_position_embeddings": 66, "type_vocab_size": 1}
    models = {}
    for n in (1.0, "learned"):
        torch.manual_seed(0)
        config = softmax1.RobertaSoftmaxNConfig(**settings, softmax_n=n)
        models[n] = softmax1.RobertaSoftmaxNForMaskedLM(config).eval()
    assert torch.equal(logits(models["learned"]), logits(models[1.0]))
    assert all(torch.equal(models["learned"].state_dict()[name], x) for name, x in models[1.0].state_dict().items())
    roberta().save_pretrained(tmp_path / "stock")  # has no sinks
    model = softmax1.RobertaSoftmaxNForMaskedLM.from_pretrained(
        tmp_path / "stock", config=softmax1.RobertaSoftmaxNConfig(**settings, softmax_n="learned")
    )
    sinks = [parameter for name, parameter in model.named_parameters() if name.endswith("attention.self.log_n")]
    assert len(sinks) == 2 and not torch.stack(list(sinks)).any()
    with torch.no_grad():
        sinks[0].copy_(torch.tensor([0.5, -1.0, 2.0, 3.0]))
    model.save_pretrained(tmp_path / "learned")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "learned")
    assert again.config.softmax_n == "learned" and torch.equal(logits(again.eval()), logits(model.eval()))
