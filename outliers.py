"""What we measure on weights and activations: excess kurtosis, without stopping the device.

Excess kurtosis is mean((x - mean)^4) / variance^2 - 3 with the population variance: 0 for a Gaussian, -1.2 for a
uniform distribution, -2 for +-1 with equal odds. Others (Bondarenko et al., "Quantizable Transformers", NeurIPS 2023)
report the full kurtosis, which is 3 higher.

The published experiment took it per sequence: all tokens x all channels of one sample pooled, then averaged over the
samples of every training step, in train mode, padding included. `ActivationKurtosis` does the same from forward hooks;
with a mask, or in packed batches, padding is left out.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from packing import IGNORED


def excess_kurtosis(values: Tensor) -> Tensor:
    """Excess kurtosis of all entries of `values` pooled. Returns a float64 scalar; NaN where the variance is 0."""
    return sequence_excess_kurtosis(values.detach().double().reshape(1, -1))[0]


def sequence_excess_kurtosis(activations: Tensor, mask: Tensor | None = None) -> Tensor:
    """Excess kurtosis of each sequence, its tokens and channels pooled.

    Args:
        activations: (batch, ...), any float dtype; half precision is widened to float32, which x^4 needs.
        mask: (batch, tokens), non-zero where a token is real; `activations` is then (batch, tokens, ...).

    Returns:
        (batch,) in float32 (float64 for float64 input). NaN where a sequence has no spread or no real token.
    """
    dtype = torch.promote_types(activations.dtype, torch.float32)
    values = activations.detach().flatten(1).to(dtype)
    if mask is None:
        count = values.shape[1]
        # Two passes (mean first) because float32 power sums cancel where the mean is large; squaring in place keeps
        # the extra memory at one copy of the activation.
        mean = values.mean(1)
        squares = (values - mean[:, None]).square_()
    else:
        tokens = mask.to(dtype).reshape(*mask.shape, *[1] * (activations.dim() - 2))
        weights = tokens.expand_as(activations).flatten(1)
        count = weights.sum(1)
        mean = (values * weights).sum(1) / count
        squares = (values - mean[:, None]).mul_(weights).square_()
    variance = _beyond_rounding(squares.sum(1) / count, mean, dtype)
    fourth = squares.square_().sum(1) / count
    return fourth / variance.square() - 3


def weight_excess_kurtosis(model: nn.Module) -> dict[str, float]:
    """Excess kurtosis over all entries of every parameter, by parameter name (float64 arithmetic)."""
    return {name: excess_kurtosis(parameter).item() for name, parameter in model.named_parameters()}


def token_moments(activations: Tensor) -> Tensor:
    """Mean and summed central powers 2, 3 and 4 of each token's channels.

    Args:
        activations: (tokens, channels), any float dtype; half precision is widened to float32.

    Returns:
        (tokens, 4) in float32 (float64 for float64 input).
    """
    values = activations.to(torch.promote_types(activations.dtype, torch.float32))
    mean = values.mean(1)
    deviations = values - mean[:, None]
    squares = deviations.square()
    # In place: what this costs is memory traffic.
    second = squares.sum(1)
    third = deviations.mul_(squares).sum(1)
    return torch.stack([mean, second, third, squares.square_().sum(1)], 1)


def merged_excess_kurtosis(moments: Tensor, channels: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Excess kurtosis of each sequence, its tokens and channels pooled, from the moments of its tokens.

    Central moments of parts give those of the whole exactly, and without the cancellation that power sums suffer from:
    with d the mean of a part less that of the whole, M4 grows by m4 + 4 d m3 + 6 d^2 m2 + count d^4 (Pebay,
    "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order Statistical Moments", 2008).

    Args:
        moments: (modules, tokens, 4), of `token_moments`.
        channels: (modules,), over how many channels each was taken.
        sequence: (tokens,) int64, the sequence each token belongs to.
        sequences: how many there are.

    Returns:
        (modules, sequences) float64. NaN where a sequence has no spread or no token.
    """
    mean, second, third, fourth = moments.double().unbind(-1)
    channels = channels[:, None].double()

    def per_sequence(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), sequences).index_add_(1, sequence, values)

    tokens = per_sequence(torch.ones_like(mean))
    centre = per_sequence(mean) / tokens
    d = mean - centre[:, sequence]
    count = tokens * channels
    variance = per_sequence(second + channels * d**2) / count
    fourth = per_sequence(fourth + 4 * d * third + 6 * d**2 * second + channels * d**4) / count
    return fourth / _beyond_rounding(variance, centre, moments.dtype).square() - 3


def _beyond_rounding(variance: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN where entries that are all equal leave a variance of rounding error about their mean (as scipy has it)."""
    return torch.where(variance > (10 * torch.finfo(dtype).eps * mean) ** 2, variance, torch.nan)


class ActivationKurtosis:
    """Running mean, over sequences, of the excess kurtosis of every module's output, without waiting for the device.

    While it is entered (`with kurtosis: model(**batch)`) hooks on every submodule of `model` add up, on the model's own
    device; only `result()` and `state()` wait for it. Outside, the model runs as if there were no hooks.
    Where a module returns a tuple or a ModelOutput its first tensor counts.

    Args:
        model: the module to watch.

    Attributes:
        mask: (batch, tokens) or None; set it before a forward pass to count real tokens only. Modules whose output
            is not (batch, tokens, ...), BERT's one row of positions for example, are then left out.
        packed: a packed batch (packing.py) or None; set it before entering, for one forward pass. A sequence is then
            its tokens in the row, and in the head those of them that are masked.
    """

    def __init__(self, model: nn.Module):
        self.mask: Tensor | None = None
        self.packed: dict | None = None
        self._model = model
        self._handles: list = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._last: tuple = (lambda: None, None)  # weak reference to the last activations, what we took of them
        self._moments: dict[str, tuple[Tensor, int]] = {}  # of packed batches: token moments, channels

    def __enter__(self) -> ActivationKurtosis:
        self._handles = [
            # First of all hooks: one of packing.py changes what the encoder hands to the head.
            module.register_forward_hook(self._hook(name), prepend=True)
            for name, module in self._model.named_modules()
            if name
        ]
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.packed is not None:
            self._merge_packed()

    def _hook(self, name: str):
        def add(module: nn.Module, inputs, output) -> None:
            activations = output if isinstance(output, Tensor) else output[0]
            if self.mask is not None and activations.shape[:2] != self.mask.shape:
                return
            # A module often returns the very tensor that its last child did (LayerNorm, then the block around it).
            if activations is not self._last[0]():
                with torch.no_grad():
                    if self.packed is None:
                        taken = sequence_excess_kurtosis(activations, self.mask)
                    else:
                        taken = token_moments(activations.detach()[0])
                self._last = (weakref.ref(activations), taken)
            if self.packed is None:
                self._add(name, self._last[1].sum(dtype=torch.float64), self._last[1].numel())
            else:
                self._moments[name] = (self._last[1], activations.shape[-1])

        return add

    @torch.no_grad()
    def _merge_packed(self) -> None:
        """Merge tokens into sequences, in a few operations for all modules together."""
        bounds, positions = self.packed["cu_seq_lens_q"], self.packed["masked_positions"]
        sequences = self.packed["sequences"]
        tokens = torch.arange(self.packed["input_ids"].shape[1], device=positions.device)
        # Sequence s holds the tokens from bounds[s] to bounds[s + 1]. What fills a row up comes behind the last one.
        sequence = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(sequences)
        masked = torch.where(self.packed["labels"][0] == IGNORED, sequences, sequence[positions])
        for rows in (sequence, masked):
            names = [name for name, (moments, _) in self._moments.items() if len(moments) == len(rows)]
            if names:
                moments = torch.stack([self._moments[name][0] for name in names])
                channels = torch.tensor([self._moments[name][1] for name in names], device=moments.device)
                kurtosis = merged_excess_kurtosis(moments, channels, rows, sequences + 1)[:, :-1]
                present = torch.zeros(sequences + 1, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
                kurtosis = kurtosis.where(present[:-1], 0)
                for name, total in zip(names, kurtosis.sum(1), strict=True):
                    self._add(name, total, present[:-1].sum())
        self._moments = {}

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

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
        return {name: [sum(other[name][i] for other in states) for i in (0, 1)] for name in state}

    def load_state(self, state: dict[str, list]) -> None:
        """Go on from what `state()` gave; in one process of several, or it counts several times."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}
