"""The cards (README.md) of a model and of the dataset on the Hub, made of nothing but our own files."""

from __future__ import annotations

import math
import re
import statistics

import datasets
import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCardData

from published import ACTIVATIONS, WEIGHTS
from record import by_layer, look_up
from tables import shortest

DATASET = "esperanto"  # name of its repository
# All our cards have the first tag; those of test runs and of the sample have the second tag too. hub.py reads the tags
# before it overwrites a repository.
OUR_TAG, TEST_TAG = "esperberto", "test-pipeline"
LEARNED = "learned"  # what softmax1.py calls a trained n for each head


# -------------------------------------------------------------------------------------------------------- model cards

WIDGETS = ["La suno <mask>.", "Mi <mask> vin.", "Esperanto estas internacia <mask>.", "La urbo estas tre <mask>."]
# Rows of the kurtosis table about the FFN output, which the published tables leave out.
FFN_ROWS = [("FFN output: dense, activations", "output.dense"), ("FFN output: LayerNorm, activations", "output")]
KURTOSIS_ROWS = {  # by the dictionary of the results file: (label, name behind `layer.<i>.`)
    "weight_excess_kurtosis": [(f"attention output: {label}", name) for label, name, *_ in WEIGHTS],
    "activation_excess_kurtosis": [(f"attention output: {label}, activations", name) for label, name, *_ in ACTIVATIONS]
    + FFN_ROWS,
}
UNKNOWN = "Unknown: this model came without its results file."


def recorded(results: dict | None, key: str, form: str = "") -> str:
    """The value at a dotted key of the results, formatted; "unknown" where it was not recorded."""
    value = look_up(results, key, None)
    return "unknown" if value is None else format(value, form)


def kurtosis_table(results: dict) -> str:
    lines = ["| | mean ± deviation over the layers | smallest | largest |", "| --- | ---: | ---: | ---: |"]
    for kind, (label, name) in ((kind, row) for kind, rows in KURTOSIS_ROWS.items() for row in rows):
        values = by_layer(look_up(results, kind, None) or {}, name)
        values = values[~np.isnan(values)].tolist()
        if values:
            spread = f"{statistics.fmean(values):.3g} ± {statistics.pstdev(values):.2g}"
            lines.append(f"| {label} | {spread} | {min(values):.3g} | {max(values):.3g} |")
    return "\n".join(lines)


def front_matter(data: ModelCardData | dict) -> str:
    text = data.to_yaml() if isinstance(data, ModelCardData) else yaml.safe_dump(data, sort_keys=False)
    return f"---\n{text.strip()}\n---\n"


def model_card(repo: str, config: dict, results: dict | None) -> str:
    """README.md of a model: metadata for the Hub, and what a reader must know.

    Args:
        repo: "namespace/name".
        config: the model's config.json.
        results: its results/<run>.json, or None.
    """
    namespace, run = repo.split("/")
    n = config.get("softmax_n", 0.0)
    test = bool(look_up(results, "test_pipeline", None))
    data_repo = f"[{namespace}/{DATASET}](https://huggingface.co/datasets/{namespace}/{DATASET})"
    sections = [
        front_matter(model_metadata(namespace, run, n, test, results)),
        f"# {run}",
        *(["**A test run of a few steps, to try the pipeline. It has learnt nothing.**"] if test else []),
        f"A RoBERTa ({config.get('num_hidden_layers')} layers, {config.get('num_attention_heads')} heads, hidden size "
        f"{config.get('hidden_size')}) for Esperanto, trained from random weights, {attention_of(n)} One arm of a test "
        'of Evan Miller\'s ["Attention Is Off By One"](https://www.evanmiller.org/attention-is-off-by-one.html); '
        f"the run with the same seed and another n is its pair.",
        "## How to load",
        loading(repo, n),
        "## ONNX",
        exporting(config),
        "## Training data",
        training_data(data_repo, results),
        "## Training",
        UNKNOWN if results is None else recipe(results),
        "## Excess kurtosis",
        UNKNOWN
        if results is None
        else "mean((x - mean)^4) / variance^2 - 3, 0 for a Gaussian, over all entries of a parameter; for activations "
        "over the tokens and channels of one sequence, then averaged over the sequences of training (dropout on). "
        "± is the population standard deviation over the layers.\n\n" + kurtosis_table(results),
        "## Limits",
        "Trained on text of the web, which holds errors, prejudice and other languages; the model repeats them. It "
        "fills masks and can be fine-tuned, but does not write text, and reads "
        f"{config.get('max_position_embeddings', 514) - 2} tokens at most. One run is one seed: a difference between "
        "two runs is not yet a difference between softmax and softmax1."
        + (" The fast attention kernels of other libraries do not know softmax_n." if n else ""),
        "## Licence",
        "Weights and code: Apache-2.0, as the project. It covers what is ours to license, not the texts the model was "
        f"trained on, whose terms the card of {data_repo} gives.",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def model_metadata(namespace: str, run: str, n: float | str, test: bool, results: dict | None) -> ModelCardData:
    metrics = {"loss": "Held-out masked-LM loss (nats)", "perplexity": "Held-out perplexity"}
    values = {metric: look_up(results, f"validation.{metric}", None) for metric in metrics}
    measured = [
        EvalResult(
            task_type="fill-mask",
            dataset_type=f"{namespace}/{DATASET}",
            dataset_name="Esperanto, held-out split",
            dataset_split="validation",
            metric_type=metric,
            metric_value=round(value, 6),
            metric_name=metrics[metric],
        )
        for metric, value in values.items()
        if value is not None
    ]
    return ModelCardData(
        language="eo",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="fill-mask",
        mask_token="<mask>",
        tags=[OUR_TAG, "roberta", tag_of(n), "attention-is-off-by-one", *([TEST_TAG] if test else [])],
        datasets=[f"{namespace}/{DATASET}"],
        widget=[{"text": text} for text in WIDGETS],
        model_name=run,
        eval_results=measured or None,
    )


def tag_of(n: float | str) -> str:
    """The name of the arm, as in experiment.arm_name, which is not used because importing it takes seconds."""
    return "softmax_learned" if n == LEARNED else f"softmax{shortest(n)}"


def attention_of(n: float | str) -> str:
    """The end of a sentence: which attention the model has."""
    if n == 0:
        return "with ordinary softmax attention: the control arm of the experiment. It is a plain RoBERTa."
    if n == LEARNED:
        return (
            "whose attention is softmax_n, exp(x_i) / (n + sum_j exp(x_j)) in place of softmax, so that an attention "
            "head may attend to nothing. Every head has an n of its own, trained with the weights from n = 1 on: log n "
            "is a learned attention sink."
        )
    name = "softmax1" if n == 1 else f"softmax_n, n = {shortest(n)}"
    return (
        f"whose attention is {name}, exp(x_i) / ({shortest(n)} + sum_j exp(x_j)) in place of softmax, so that an "
        "attention head may attend to nothing."
    )


def loading(repo: str, n: float | str) -> str:
    trust = ", trust_remote_code=True" if n else ""
    code = f"""```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

fill = pipeline("fill-mask", model="{repo}"{trust})
print(fill("La suno <mask>."))

model = AutoModelForMaskedLM.from_pretrained("{repo}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{repo}"{trust})
```"""
    if n == 0:
        return f"{code}\n\nNo code but transformers' own is needed."
    return f"""{code}

transformers 5.0 or later. `softmax1.py`, one file of this repository that imports only torch and transformers, is the
code that `trust_remote_code=True` runs: read it first. Without it loading fails, and so does loading with a stock
RoBERTa class: the weights would silently attend with softmax. `model.config.softmax_n` is {shortest(n)}.
`AutoModel`, `AutoModelForSequenceClassification` and `AutoModelForTokenClassification` load it for fine-tuning in the
same way, and what they save keeps n."""


def exporting(config: dict) -> str:
    return f"""After the lines above (and `pip install onnx onnxscript`); the attention, and its n, are in the graph:

```python
import torch

inputs = dict(tokenizer(["La suno <mask>.", "Mi <mask> vin tre."], padding=True, return_tensors="pt"))
batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max={config["max_position_embeddings"] - 2})
shapes = {{name: {{0: batch, 1: length}} for name in inputs}}
torch.onnx.export(model.eval(), (), "model.onnx", kwargs=inputs, dynamo=True, dynamic_shapes=shapes)
```"""


def training_data(data_repo: str, results: dict | None) -> str:
    if results is None:
        return f"{UNKNOWN} The project's data is {data_repo}."
    sources = look_up(results, "dataset.sources", None) or []
    return (
        f"{data_repo}: {recorded(results, 'dataset.train_samples', ',')} samples, one line each, of "
        + "; ".join(f"{name} ({terms_of(name)[0]})" for name in sources)
        + f". SHA-256 of the training text: {recorded(results, 'dataset.sha256')}."
    )


def recipe(results: dict) -> str:
    def at(key: str, form: str = "") -> str:
        return recorded(results, key, form)

    seconds = look_up(results, "training.wall_seconds", None)
    hours = "time unknown" if seconds is None else f"{seconds / 3600:.2f} h"
    dirty = " with uncommitted changes" if look_up(results, "git.dirty", None) else ""
    rows = {
        "n of softmax_n; seed": f"{shortest(results['softmax_n'])}; {at('seed')}",
        "objective": f"masked LM, {at('settings.mlm_probability', '.0%')} of the tokens (80/10/10)",
        "steps; effective batch": f"{at('training.steps', ',')}; {at('effective_batch_size')}",
        "epochs": at("settings.num_train_epochs"),
        "samples; real tokens": f"{at('training.samples', ',')}; {at('training.tokens', ',')}",
        "tokens of a sample at most": at("settings.max_length"),
        "optimiser": f"{at('settings.optim')}, lr {at('settings.learning_rate')}, {at('settings.lr_scheduler_type')}, "
        f"warm-up {at('settings.warmup_steps')}, weight decay {at('settings.weight_decay')}, "
        f"clip {at('settings.max_grad_norm')}",
        "precision": at("dtype"),
        "hardware": f"{at('hardware.count')} x {at('hardware.name')}, {hours}",
        "code": f"commit {at('git.commit')}{dirty}",
        "versions": ", ".join(f"{name} {version}" for name, version in (results.get("versions") or {}).items()),
        "**training loss, mean over the run**": at("training.loss_mean", ".4f"),
        "**held-out loss; perplexity**": f"{at('validation.loss', '.4f')}; {at('validation.perplexity', '.2f')} "
        f"({at('validation.masked_tokens', ',')} masked tokens)",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


# ------------------------------------------------------------------------------------------------------- dataset card

# What the providers state, read in November 2026.
OSCAR_TERMS = (
    "OSCAR 2019, from Common Crawl",
    "The [OSCAR project](https://oscar-project.org) releases its packaging under CC0 1.0 and says that it owns none of "
    "the text; for that it refers to [Common Crawl's terms of use](https://commoncrawl.org/terms-of-use). The authors' "
    "rights remain.",
)
LEIPZIG_TERMS = (
    "Leipzig Corpora Collection",
    "The [terms of usage](https://wortschatz.uni-leipzig.de/en/usage) put the corpora offered for download under "
    "Creative Commons BY. Some who used them in other years quote BY-NC, which holds for what the site itself answers, "
    "so ask before commercial use. Attribution: D. Goldhahn, T. Eckart, U. Quasthoff, Building Large Monolingual "
    "Dictionaries at the Leipzig Corpora Collection: From 100 to 200 Languages, LREC 2012.",
)
SAMPLE_TERMS = ("written for this project", "Written for this project by a language model; CC0 1.0.")
OTHER_TERMS = ("the user's own file", "A file of whoever built this dataset; its terms are not known here.")


def terms_of(source: str) -> tuple[str, str]:
    """(what it is, its terms) of a source, by its name in the manifest."""
    if source == "oscar":
        return OSCAR_TERMS
    if source == "sample":
        return SAMPLE_TERMS
    return LEIPZIG_TERMS if re.fullmatch(r"epo_\w+_\d{4}_\d+[KM]", source) else OTHER_TERMS


# The Hub's names for sizes.
SIZES = [
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (math.inf, "10M<n<100M"),
]


def dataset_card(repo: str, manifest: dict, splits: dict[str, datasets.Dataset]) -> str:
    """README.md of the dataset: metadata for the Hub's viewer, and the manifest's figures.

    Args:
        repo: "namespace/name".
        manifest: data/manifest.json.
        splits: the splits themselves, for their sizes.
    """
    sources = manifest["sources"]
    names = [source["name"] for source in sources]
    total = sum(len(split) for split in splits.values())
    test = names == ["sample"]
    table = ["| source | lines read | kept | dropped | SHA-256 of the file |", "| --- | ---: | ---: | --- | --- |"]
    for source in sources:
        dropped = ", ".join(f"{count:,} {why}" for why, count in source["lines_dropped"].items() if count) or "0"
        read, kept = f"{source['lines_read']:,}", f"{source['lines_kept']:,}"
        table.append(f"| {source['name']} | {read} | {kept} | {dropped} | `{source['sha256']}` |")
    figures = ["| split | samples | SHA-256 of the text |", "| --- | ---: | --- |"]
    for split, numbers in manifest["splits"].items():
        figures.append(f"| {split} | {numbers['samples']:,} | `{numbers['sha256']}` |")
    kinds = dict.fromkeys(terms_of(name) for name in names)
    shuffled = "samples stand source after source" if len(names) > 1 else "samples stand in the order of the source"
    sections = [
        front_matter(dataset_metadata(splits, total, test)),
        "# Esperanto",
        *(["**The small corpus of the project, to try the pipeline.**"] if test else []),
        f"Esperanto text, one line a sample, {total:,} samples: the training text of the EsperBERTo models. "
        f"Duplicates are kept, {shuffled}. {manifest['validation_fraction']:.2%} of the samples are held out; which "
        "ones depends on their text alone, so that no text is in both splits.",
        f'```python\nfrom datasets import load_dataset\n\ndata = load_dataset("{repo}")\n```',
        "\n".join(figures),
        "## Sources and terms",
        "\n".join(table),
        "\n\n".join(f"**{what}.** {terms}" for what, terms in kinds),
        "This is what the providers state, as far as we know; it is no legal advice. Where you hold rights in a text "
        "and want it removed, open a discussion in this repository.",
        "## Limits",
        "Invented texts, far too few to learn a language from."
        if test
        else "Mostly text found on the web by machine: it holds errors, other languages, boilerplate, personal data "
        "that was public, and opinions of every kind. Sentences of the Leipzig corpora stand alone, out of context.",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def dataset_metadata(splits: dict[str, datasets.Dataset], total: int, test: bool) -> dict:
    return {
        "language": ["eo"],
        "license": "cc0-1.0" if test else "other",
        **({} if test else {"license_name": "terms-of-the-sources", "license_link": "#sources-and-terms"}),
        "pretty_name": "Esperanto",
        "task_categories": ["fill-mask", "text-generation"],
        "size_categories": [next(size for limit, size in SIZES if total < limit)],
        "tags": [OUR_TAG, *([TEST_TAG] if test else [])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
        "dataset_info": {
            "features": [{"name": "text", "dtype": "string"}],
            "splits": [
                {"name": name, "num_bytes": split.data.nbytes, "num_examples": len(split)}
                for name, split in splits.items()
            ],
            "dataset_size": sum(split.data.nbytes for split in splits.values()),
        },
    }
