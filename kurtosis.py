"""Excess kurtosis of parameters, and of activations in training as the published experiment measured it; moments.

Excess kurtosis is mean((x - mean)^4) / variance^2 - 3 with the population variance: 0 for a Gaussian, -1.2 for a
uniform distribution, -2 for +-1 with equal odds. Others (Bondarenko et al., "Quantizable Transformers", NeurIPS 2023)
report the full kurtosis, which is 3 higher.

The published experiment measured it by sequence: over all tokens and channels of a sample, then averaged over the
samples of every training step, in train mode, with padding. `ActivationKurtosis` does the same by forward hooks; packed
batches have no padding.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from hooks import Hooks
from packing import IGNORED
from softmax1 import learned_sinks


def with_float64(values: Tensor) -> Tensor:
    """`values`, moved to the CPU if their device has no float64 (Apple's GPUs, MPS)."""
    return values.cpu() if values.device.type == "mps" else values


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters except learned sinks: one number for each head, which may be -inf and is never quantized."""
    sinks = learned_sinks(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in sinks}


def weight_excess_kurtosis(model: nn.Module) -> dict[str, float]:
    """Excess kurtosis over all entries of every weight, by parameter name, in float64; NaN if all are equal."""
    entries = {
        name: with_float64(weight.detach()).double().reshape(1, -1) for name, weight in weights_of(model).items()
    }
    return {name: sequence_excess_kurtosis(values).item() for name, values in entries.items()}


def sequence_excess_kurtosis(activations: Tensor) -> Tensor:
    """Excess kurtosis of each sequence, its tokens and channels pooled.

    Args:
        activations: (batch, ...), any float dtype; half precision is converted to float32, because x^4 overflows.

    Returns:
        (batch,) in float32 (float64 for float64 input). NaN where the spread of a sequence is not larger than the
        rounding error of its mean: equal entries have a variance of that size (scipy decides in the same way).
    """
    dtype = torch.promote_types(activations.dtype, torch.float32)
    values = activations.detach().flatten(1).to(dtype)
    # Two passes (mean first), because float32 power sums cancel where the mean is large. Squaring in place needs only
    # one copy of the activations.
    mean = values.mean(1)
    squares = (values - mean[:, None]).square_()
    variance = squares.sum(1) / values.shape[1]
    variance = torch.where(variance > (10 * torch.finfo(dtype).eps * mean) ** 2, variance, torch.nan)
    fourth = squares.square_().sum(1) / values.shape[1]
    return fourth / variance.square() - 3


# -------------------------------------------------------------------------------------- moments that add up exactly


class Moments:
    """Count, mean and central power sums of groups of numbers: a (groups, 5) float64 tensor [n, mean, M2, M3, M4].

    M_k = sum (x - mean)^k. The tensor is on the device of the numbers if that has float64, otherwise on the CPU. Groups
    are merged without cancellation, even if their means are far from 0 (Pebay, "Formulas for robust, one-pass parallel
    computation of covariances and arbitrary-order statistical moments", 2008), so the amount of text is not limited.
    """

    def __init__(self, sums: Tensor):
        self.sums = sums

    @classmethod
    def of_rows(cls, values: Tensor) -> Moments:
        """Each row of `values` (rows, entries) becomes a group. Deviations are float32 (float64 for float64 input)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        mean = values.mean(1, keepdim=True)
        deviations = values - mean
        squares = deviations.square()
        # In place and in this order, because the time is that of reading and writing memory.
        sums = squares.sum(1), deviations.mul_(squares).sum(1), squares.square_().sum(1)
        mean, *sums = (with_float64(total).double() for total in (mean[:, 0], *sums))
        return cls(torch.stack([torch.full_like(mean, values.shape[1]), mean, *sums], 1))

    def merged(self, group: Tensor, groups: int) -> Moments:
        """Merge the rows into `groups` groups: row i goes into group[i]. Groups without a row have n = 0."""
        group = group.to(self.sums.device)
        n, mean, m2, m3, m4 = self.sums.unbind(1)

        def total(terms: Tensor) -> Tensor:
            return terms.new_zeros(groups).index_add_(0, group, terms)

        count = total(n)
        merged_mean = total(n * mean) / count.clamp_min(1)
        d = mean - merged_mean[group]
        merged_m2 = total(m2 + n * d**2)
        merged_m3 = total(m3 + 3 * d * m2 + n * d**3)
        merged_m4 = total(m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4)
        return Moments(torch.stack([count, merged_mean, merged_m2, merged_m3, merged_m4], 1))

    def __add__(self, other: Moments) -> Moments:
        groups = torch.arange(len(self.sums), device=self.sums.device).repeat(2)
        return Moments(torch.cat([self.sums, other.sums])).merged(groups, len(self.sums))

    def pooled(self) -> Moments:
        """All groups merged into one."""
        return self.merged(torch.zeros(len(self.sums), dtype=torch.long, device=self.sums.device), 1)

    @property
    def excess_kurtosis(self) -> Tensor:
        """(groups,) in float64; NaN where a group is empty or its spread is not above float32 rounding of its mean."""
        n, mean, m2, _, m4 = self.sums.unbind(1)
        spread = m2 > n * (10 * torch.finfo(torch.float32).eps * mean) ** 2
        return torch.where(spread, n * m4 / m2.square() - 3, torch.nan)


# -------------------------------------------------------------------------------- the published training-time statistic


class ActivationKurtosis(Hooks):
    """Running mean, over sequences, of the excess kurtosis of every module's output, without waiting for the device.

    Inside `with kurtosis: model(**batch)`, hooks on every submodule of `model` add to sums on the model's own device;
    only `result()` and `state()` wait for it. Outside, the model runs without hooks. If a module returns a tuple or a
    ModelOutput, its first tensor is measured.

    Args:
        model: the module to watch.

    Attributes:
        packed: None, or the packed batch (packing.py) of the next forward pass; set it before `with`. A sequence then
            consists of its tokens in the row, and in the masked-LM head of its masked tokens.
    """

    def __init__(self, model: nn.Module):
        # These hooks run before all others, because a hook of packing.py changes the output of the encoder.
        super().__init__(((module, self._hook(name)) for name, module in model.named_modules() if name), first=True)
        self.packed: dict | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._last: tuple = (
            lambda: None,
            None,
        )  # weak reference to the last activations, and their kurtosis or moments
        self._moments: dict[str, Tensor] = {}  # by module: moments of the tokens of a packed batch

    def __exit__(self, *exc_info) -> None:
        super().__exit__(*exc_info)
        if self.packed is not None:
            self._merge_packed()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs, output) -> None:
            activations = output if isinstance(output, Tensor) else output[0]
            # A module often returns the tensor that its last child returned (LayerNorm, then the block around it).
            if activations is not self._last[0]():
                with torch.no_grad():
                    if self.packed is None:
                        measured = sequence_excess_kurtosis(activations)
                    else:
                        measured = Moments.of_rows(activations.detach()[0]).sums
                self._last = (weakref.ref(activations), measured)
            measured = self._last[1]
            if self.packed is None:
                self._add(name, with_float64(measured).sum(dtype=torch.float64), measured.numel())
            else:
                self._moments[name] = measured

        return add

    @torch.no_grad()
    def _merge_packed(self) -> None:
        """Merge the moments of tokens into those of sequences, in a few operations for all modules together."""
        bounds, positions = self.packed["cu_seq_lens_q"], self.packed["masked_positions"]
        sequences = self.packed["sequences"]
        tokens = torch.arange(self.packed["input_ids"].shape[1], device=positions.device)
        # Sequence s holds the tokens from bounds[s] to bounds[s + 1]. Filling tokens follow the last sequence.
        sequence = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(sequences)
        masked = torch.where(self.packed["labels"][0] == IGNORED, sequences, sequence[positions])
        groups = sequences + 1
        for rows in (sequence, masked):
            names = [name for name, moments in self._moments.items() if len(moments) == len(rows)]
            if names:
                tokens = Moments(torch.cat([self._moments[name] for name in names]))
                group = torch.cat([module * groups + rows for module in range(len(names))])
                kurtosis = tokens.merged(group, len(names) * groups).excess_kurtosis.view(-1, groups)[:, :-1]
                present = torch.zeros(groups, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)[:-1]
                present = present.to(kurtosis.device)
                for name, total in zip(names, kurtosis.where(present, 0).sum(1), strict=True):
                    self._add(name, total, present.sum())
        self._moments = {}

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        self._sums[name] = self._sums.get(name, 0) + total
        self._counts[name] = self._counts.get(name, 0) + count

    def result(self) -> dict[str, float]:
        """Mean excess kurtosis by module name, over all processes. Modules that never ran are absent."""
        return {name: total / count for name, (total, count) in self.state().items()}

    def state(self) -> dict[str, list]:
        """{module name: [sum, count]} over all processes, for a checkpoint. Every process has to call it."""
        state = {name: [float(total), int(self._counts[name])] for name, total in self._sums.items()}
        if not torch.distributed.is_initialized():
            return state
        states = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
        return {name: [sum(other.get(name, (0.0, 0))[i] for other in states) for i in (0, 1)] for name in state}

    def load_state(self, state: dict[str, list]) -> None:
        """Continue from the result of `state()`. Only one of several processes may do so, or it is added repeatedly."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}
