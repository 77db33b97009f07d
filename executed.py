"""INT8 that is executed: a masked-LM is exported to ONNX, quantized and run by ONNX Runtime on this CPU.

quantization.py simulates 8 bits: it rounds numbers, and multiplies them in float32. Here 8-bit integers are multiplied.
Both modules score the same texts with the same masks and are calibrated on the same training texts, so their gaps can
be compared text by text. DEFINITIONS.md compares which tensors each of them quantizes.

Nothing is padded: texts of equal length run together. So the graph has no attention mask, and the score of a masked key
cannot widen a range. Models of all arms are exported to the same graph: a softmax over one more logit, log n (minus
infinity for n = 0), whose weight is dropped. That logit is a constant and not an activation of the model. If it were
rounded together with the scores, their range would depend on n. So everything between the scores and the attention
weights stays in float32; the scores and the attention weights themselves are rounded to 8 bits.

Needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import io
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx needs it; if it is missing, this import fails before hours of measuring)
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from held_out import longest_text
from hooks import Hooks
from packing import IGNORED
from quantization import ATTENTION, EXECUTED, PERCENTILE, gap_error, measured_copy, scheme_figures
from record import hardware, one_line

OPSET = 20  # the first version of ONNX's operators with GELU as one operator: otherwise each of its steps is rounded
TOKENS = 1024  # at most in one call: the percentile calibrator holds all activations of a call in memory
UNCHANGED = 1e-4  # nats by which the exported model's float32 loss may differ from PyTorch's
LATENCY_LENGTH = 128  # tokens of the text whose latency is measured; fewer if the model has fewer positions
REPETITIONS, WARM_UP = 30, 3  # calls of each format; the formats are called in turn
MASKED_EVERY = 7  # every seventh token of that text is predicted: about the share of masked tokens
# The attention of quantization.py without a mask, because nothing is padded.
UNMASKED = "softmax_n_unmasked"
AttentionInterface.register(UNMASKED, AttentionInterface()[ATTENTION])
AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)

METHODS = {"int8_minmax": CalibrationMethod.MinMax, "int8_percentile": CalibrationMethod.Percentile}
SIMULATED = {"int8_minmax": "w8a8_static", "int8_percentile": "w8a8_percentile"}
# Operators that only move values: they run in the format of their input.
MOVES = (
    "Cast Concat Expand Flatten Gather GatherElements Identity Pad Range Reshape Shape Slice Split Squeeze Transpose "
    "Unsqueeze"
).split()


class NotExecuted(RuntimeError):
    """The model could not be exported, quantized or run; the message is one line that names the step that failed."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Turn every error inside into NotExecuted: PyTorch, ONNX and ONNX Runtime raise about twenty classes of errors."""
    logging.disable(logging.WARNING)  # the exporter warns that torchvision is missing
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the percentile calibrator prints
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise NotExecuted(f"{name} failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------- the texts


@dataclass
class Group:
    """Texts of equal length, without padding, that run together, and their masked tokens."""

    texts: list[int]  # the number of each text, counted in the order of the batches
    input_ids: np.ndarray  # (texts, tokens)
    positions: np.ndarray  # (masked,) index of each masked token among all tokens of the group
    labels: np.ndarray  # (masked,) the token that was masked
    row: np.ndarray  # (masked,) the row of input_ids that holds the masked token

    @property
    def feed(self) -> dict[str, np.ndarray]:
        return {"input_ids": self.input_ids, "positions": self.positions}


def groups_of(batches: list[dict]) -> list[Group]:
    """The texts of `held_out_batches` without padding, grouped by length: TOKENS tokens at most, or one text."""
    by_length: dict[int, list[tuple]] = {}
    number = 0
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            text = number, ids[mask].numpy(), labels[mask].numpy()
            by_length.setdefault(int(mask.sum()), []).append(text)
            number += 1
    groups = []
    for length, texts in sorted(by_length.items()):
        size = max(TOKENS // length, 1)
        for start in range(0, len(texts), size):
            numbers, ids, labels = zip(*texts[start : start + size], strict=True)
            labels = np.stack(labels)
            row, column = (labels != IGNORED).nonzero()
            groups.append(Group(list(numbers), np.stack(ids), row * length + column, labels[row, column], row))
    return groups


class Reader:
    """The groups as a calibration data reader of ONNX Runtime, which asks for one slice of them after the other."""

    def __init__(self, groups: list[Group]):
        self.feeds = [group.feed for group in groups]
        self.set_range(0, len(groups))

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.remaining = iter(self.feeds[start_index:end_index])

    def get_next(self) -> dict | None:
        return next(self.remaining, None)


def text_losses(session: onnxruntime.InferenceSession, groups: list[Group]) -> np.ndarray:
    """(texts,) sum of the cross-entropy of the masked tokens of every text, in nats, in the order of the batches."""
    sums = np.zeros(sum(len(group.texts) for group in groups))
    for group in groups:
        if not len(group.positions):
            continue
        logits = torch.from_numpy(session.run(["logits"], group.feed)[0]).float()
        losses = F.cross_entropy(logits, torch.from_numpy(group.labels), reduction="none").double().numpy()
        sums[group.texts] = np.bincount(group.row, losses, minlength=len(group.texts))
    return sums


# ------------------------------------------------------------------------------------------------------- the export


class _Exported(nn.Module):
    """Maps input_ids (B, T), and positions (M,) among all B * T tokens, to logits (M, vocabulary)."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = measured_copy(model).cpu()
        self.model.set_attn_implementation(UNMASKED)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                _flatten(module)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        def select(module: nn.Module, inputs: tuple, output):
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, positions)
            return output

        with Hooks([(self.model.base_model, select)]):
            return self.model(input_ids).logits


def _flatten(linear: nn.Linear) -> None:
    """Give a linear layer inputs of shape (tokens, channels), so that it is exported as one Gemm with a 32-bit bias.

    With a batch dimension it would be exported as a MatMul and an Add: ONNX Runtime would then round the bias to 8
    bits, and the product to 8 bits before the addition.
    """
    shapes = []

    def flatten(module: nn.Module, inputs: tuple) -> tuple:
        shapes.append(inputs[0].shape[:-1])
        return (inputs[0].flatten(0, -2) if inputs[0].dim() > 2 else inputs[0],)

    def restore(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        shape = shapes.pop()
        return output.reshape(*shape, -1) if len(shape) > 1 else output

    linear.register_forward_pre_hook(flatten)
    linear.register_forward_hook(restore)


def export(model: PreTrainedModel, path: Path) -> None:
    """Write `model` as one ONNX file with the inputs input_ids (B, T) and positions (M,) and the output logits (M, V).

    B, T and M may change from call to call. The masked-LM head runs at `positions` only, as in held_out.masked_loss.

    Raises:
        NotExecuted: PyTorch cannot export the model.
    """
    longest = longest_text(model)
    batch, masked = torch.export.Dim("batch"), torch.export.Dim("masked")
    length = torch.export.Dim("length", max=longest)
    with step("the export to ONNX"):
        example = (torch.full((2, min(11, longest)), 5), torch.tensor([1, 3, 7]))
        program = torch.onnx.export(
            _Exported(model).eval(),
            example,
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length}, {0: masked}),
            input_names=["input_ids", "positions"],
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
        exported = program.model_proto
        # The exporter stores the Python class and source line of every node: half a megabyte that no model needs.
        for part in (exported.graph, *exported.graph.node, *exported.graph.value_info, *exported.graph.initializer):
            del part.metadata_props[:]
        onnx.save(exported, path)


# ------------------------------------------------------------------------------------------------- the quantization


def quantize(path: Path, output: Path, scheme: str, groups: list[Group]) -> None:
    """Static quantization by ONNX Runtime: QDQ format, activations QUInt8, weights QInt8, one range a tensor.

    Calibration runs one group after the other and merges the results (`CalibStridedMinMax`, for every calibrator), so
    only one group's activations are in memory. Minima and maxima are the same as of all groups together; percentiles
    come from merged histograms. Their bins keep the width that the first group determines, and more bins are added for
    wider ranges. With the shortest text first, in which a head may attend to nothing, there were millions of bins, and
    they took 20 GB: so the group with the most tokens comes first. Percentile ranges cut off the same share at each end
    as w8a8_percentile does.

    Args:
        path: an ONNX file that quant_pre_process has written.
        output: where to write the quantized file.
        scheme: a key of METHODS.
        groups: the calibration texts.

    Raises:
        NotExecuted: the quantization fails.
    """
    with step("the quantization"):
        ordered = sorted(groups, key=lambda group: group.input_ids.size, reverse=True)
        # Pad (for a number n) and Concat with Expand (for learned sinks) put the null logit beside the scores.
        kinds = sorted((set(QDQRegistry) | set(QLinearOpsRegistry)) - {"Softmax", "Pad", "Concat", "Expand"})
        quantize_static(
            path,
            output,
            Reader([group for group in ordered if len(group.positions)]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[scheme],
            nodes_to_exclude=behind_softmax(onnx.load(path)),
            # ONNX Runtime divides the share that it cuts off between both ends; ours is the share of each end.
            extra_options={"CalibStridedMinMax": 1, "CalibPercentile": 100 * (2 * PERCENTILE - 1)},
        )
        leave_logits(output)


def behind_softmax(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes between every softmax and the product of attention weights and values."""
    readers = ONNXModel(model).input_name_to_nodes()
    names = []
    unvisited = [node for node in model.graph.node if node.op_type == "Softmax"]
    while unvisited:
        for reader in readers.get(unvisited.pop().output[0], []):
            if reader.op_type != "MatMul" and reader.name not in names:
                names.append(reader.name)
                unvisited.append(reader)
    return names


def leave_logits(path: Path) -> None:
    """Remove the rounding of the logits from a quantized model, in place.

    ONNX Runtime rounds the output of every Gemm. Percentile ranges would cut off exactly the largest of the thousands
    of logits, and that damage would hide all other damage. The simulated schemes do not round the logits either.
    """
    model = ONNXModel(onnx.load(path))
    producer = model.output_name_to_node()
    dequantize = producer["logits"]
    if dequantize.op_type != "DequantizeLinear":
        return
    quantize = producer[dequantize.input[0]]
    producer[quantize.input[0]].output[0] = "logits"
    model.remove_nodes([dequantize, quantize])
    onnx.save(model.model, path)


def session_of(path: Path, threads: int, optimized: bool = True, written: Path | None = None):
    """An inference session on the CPU.

    Args:
        path: an ONNX file.
        threads: number of threads of an operator.
        optimized: replace dequantize, compute, quantize by integer kernels.
        written: where to save the graph that runs after this replacement.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: saving an optimized graph warns that it is for this machine
    # On x86 CPUs without 8-bit dot products (VNNI), sums of U8 x S8 products saturate: this selects exact kernels.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written:
        options.optimized_model_filepath = str(written)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ----------------------------------------------------------------------------------------- which operators are in INT8


def operators(quantized: Path, running: Path) -> dict:
    """Which operators have 8-bit inputs and outputs, and which run with integer kernels.

    Args:
        quantized: the QDQ graph.
        running: the graph that ONNX Runtime made of it (`session_of(written=)`).

    Returns:
        `operators` of DEFINITIONS.md, without `simulated_activations`.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(quantized))
    graph = model.graph
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*graph.value_info, *graph.input, *graph.output)}
    stored = {entry.name: entry.data_type for entry in graph.initializer}
    producer, readers = ONNXModel(model).output_name_to_node(), ONNXModel(model).input_name_to_nodes()

    def from_8_bits(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in MOVES:
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def to_8_bits(name: str) -> bool:
        return name in readers and all(
            to_8_bits(node.output[0]) if node.op_type in MOVES else node.op_type == "QuantizeLinear"
            for node in readers[name]
        )

    formats = {"8 bits in and out": Counter(), "float32": Counter()}
    scales, parameters = set(), Counter()
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scales.add(node.input[1])
        elif node.op_type == "DequantizeLinear":
            if stored_type := stored.get(node.input[0]):
                parameters["biases" if stored_type == onnx.TensorProto.INT32 else "weights"] += 1
        elif node.op_type not in MOVES and types.get(node.output[0]) == onnx.TensorProto.FLOAT:
            int8 = all(map(from_8_bits, filter(None, node.input))) and all(map(to_8_bits, filter(None, node.output)))
            formats["8 bits in and out" if int8 else "float32"][node.op_type] += 1
    no_floats = {name for name, kind in {**types, **stored}.items() if kind != onnx.TensorProto.FLOAT}
    kernels = {"int8": Counter(), "float32": Counter(), "conversions": Counter()}
    for node in onnx.load(running).graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kernels["conversions"][node.op_type] += 1
        elif node.op_type.startswith("Q") or "Integer" in node.op_type:
            kernels["int8"][node.op_type] += 1
        elif node.op_type not in MOVES and not no_floats.intersection(node.output):
            kernels["float32"][node.op_type] += 1
    qdq, kernels = (
        {name: dict(sorted(counter.items())) for name, counter in counters.items()} for counters in (formats, kernels)
    )
    return {"qdq": qdq, "kernels": kernels, "activations": len(scales), **parameters}


# --------------------------------------------------------------------------------------------------------- the speed


def latency(paths: dict[str, Path], model: PreTrainedModel) -> dict:
    """`latency` of DEFINITIONS.md: milliseconds of one text on one thread.

    The formats run in turn, so that a slow moment affects all of them.
    """
    tokens = min(LATENCY_LENGTH, longest_text(model))
    ids = np.random.default_rng(0).integers(min(5, model.config.vocab_size - 1), model.config.vocab_size, (1, tokens))
    feed = {"input_ids": ids, "positions": np.arange(0, tokens, MASKED_EVERY)}
    sessions = {name: session_of(path, threads=1) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(WARM_UP + REPETITIONS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(["logits"], feed)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    formats = {}
    for name, milliseconds in times.items():
        q25, median, q75 = statistics.quantiles(milliseconds, n=4, method="inclusive")
        speedup = statistics.median(exact / own for exact, own in zip(times["float32"], milliseconds, strict=True))
        formats[name] = {"median": median, "q25": q25, "q75": q75, "speedup": speedup}
    return {
        "batch": 1,
        "tokens": tokens,
        "predicted": len(feed["positions"]),
        "threads": 1,
        "repetitions": REPETITIONS,
        "formats": formats,
    }


# ------------------------------------------------------------------------------------------------------- everything


def agreement(changes: np.ndarray, simulated: np.ndarray, masked: np.ndarray) -> dict:
    """How the changes of the loss by executed and by simulated quantization agree.

    Args:
        changes, simulated: (texts,) loss in 8 bits minus loss in float32, executed and simulated.
        masked: (texts,) number of masked tokens.

    Returns:
        {"difference": executed gap minus simulated gap, "error": its standard error over texts, "correlation":
        Pearson's, over texts, of the changes for each masked token; NaN where it is not defined}
    """
    predicted = masked > 0
    pair = np.stack([changes[predicted], simulated[predicted]]) / masked[predicted]
    defined = np.isfinite(pair).all() and pair.shape[1] > 2 and (pair.std(1) > 0).all()
    return {
        "difference": float((changes - simulated).sum() / masked.sum()),
        "error": gap_error(changes - simulated, masked),
        "correlation": float(np.corrcoef(pair)[0, 1]) if defined else math.nan,
    }


def execute(model: PreTrainedModel, batches: list[dict], calibration: list[dict], damage: dict) -> dict:
    """Run a model in 8 bits by ONNX Runtime, and compare the losses with those that quantization.py simulated.

    Args:
        model: a masked-LM in float32.
        batches: the `held_out_batches` that `damage` was scored on.
        calibration: the first draw of calibration batches of `damage`.
        damage: what `quantization.measure_damage` returned for this model.

    Returns:
        The figures that DEFINITIONS.md defines in "INT8 that is executed", for each format of quantization.EXECUTED.
        "masked" and "texts" are as in `damage`, so that quantization.bootstrap_difference applies. Where the model
        cannot be exported, quantized or run: {"error": one line}.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="executed-") as folder:
            return _execute(model, groups_of(batches), groups_of(calibration), damage, Path(folder))
    except NotExecuted as error:
        return {"error": str(error)}


def _execute(model: PreTrainedModel, groups: list[Group], calibration: list[Group], damage: dict, folder: Path) -> dict:
    threads = torch.get_num_threads()
    paths = {name: folder / f"{name}.onnx" for name in EXECUTED}
    masked = np.array(damage["masked"], dtype=float)
    export(model, paths["float32"])
    with step("running it in float32"):
        losses = {"float32": text_losses(session_of(paths["float32"], threads), groups)}
        loss = losses["float32"].sum() / masked.sum()
        change = float(loss - damage["schemes"]["float32"]["loss"])
    if not abs(change) < UNCHANGED:
        raise NotExecuted(f"the export changed the model: its float32 loss differs by {change:.2g} nats")
    prepared = folder / "prepared.onnx"
    with step("the preparation"):
        quant_pre_process(paths["float32"], prepared)
    agreements = {}
    simulated = {name: np.array(sums, dtype=float) for name, sums in damage["texts"].items()}
    for scheme, simulated_scheme in SIMULATED.items():
        quantize(prepared, paths[scheme], scheme, calibration)
        with step("running it in 8 bits"):
            running = folder / "running.onnx"
            losses[scheme] = text_losses(session_of(paths[scheme], threads, written=running), groups)
            counts = operators(paths[scheme], running) | {"simulated_activations": len(damage["ranges"])}
            in_float32 = text_losses(session_of(paths[scheme], threads, optimized=False), groups)
        changes = losses[scheme] - losses["float32"]
        agreements[scheme] = {
            "simulated": simulated_scheme,
            **agreement(changes, simulated[simulated_scheme] - simulated["float32"], masked),
            "arithmetic": float((losses[scheme] - in_float32).sum() / masked.sum()),
        }
    with step("measuring the latency"):
        measured_latency = latency(paths, model)
    schemes = {}
    for name, sums in losses.items():
        schemes[name] = scheme_figures(sums, losses["float32"], masked, [])
        # The differences are summed, as in `agreement`; a difference of sums has other last digits.
        schemes[name]["gap"] = float((sums - losses["float32"]).sum() / masked.sum())
        schemes[name]["bytes"] = paths[name].stat().st_size
    return {
        "schemes": schemes,
        "masked_tokens": int(masked.sum()),
        "masked": damage["masked"],
        "texts": {name: [float(f"{loss:.6g}") for loss in sums] for name, sums in losses.items()},
        "float32_change": change,
        "agreement": agreements,
        "latency": measured_latency,
        "operators": counts,
        "calibration_tokens": sum(group.input_ids.size for group in calibration if len(group.positions)),
        "hardware": hardware(torch.device("cpu")),
        "onnxruntime": onnxruntime.__version__,
    }
