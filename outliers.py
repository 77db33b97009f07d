"""What we measure on weights and activations: excess kurtosis, without stopping the device.

Excess kurtosis is mean((x - mean)^4) / variance^2 - 3 with the population variance: 0 for a Gaussian, -1.2 for a
uniform distribution, -2 for +-1 with equal odds. Others (Bondarenko et al., "Quantizable Transformers", NeurIPS 2023)
report the full kurtosis, which is 3 higher.

The published experiment took it per sequence: all tokens x all channels of one sample pooled, then averaged over the
samples of every training step, in train mode, padding included. `ActivationKurtosis` does the same from forward hooks;
with a mask it leaves padding out.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn


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
    variance = squares.sum(1) / count
    # Equal entries leave a variance of rounding error about their mean (scipy draws such a line too).
    variance = torch.where(variance > (10 * torch.finfo(dtype).eps * mean) ** 2, variance, torch.nan)
    fourth = squares.square_().sum(1) / count
    return fourth / variance.square() - 3


def weight_excess_kurtosis(model: nn.Module) -> dict[str, float]:
    """Excess kurtosis over all entries of every parameter, by parameter name (float64 arithmetic)."""
    return {name: excess_kurtosis(parameter).item() for name, parameter in model.named_parameters()}


class ActivationKurtosis:
    """Running mean, over sequences, of the excess kurtosis of every module's output.

    Hooks every submodule of `model` and adds up on the model's own device; only `result()` waits for the device.
    Where a module returns a tuple or a ModelOutput its first tensor counts.
    Use as a context manager or call `remove()`.

    Args:
        model: the module to watch.

    Attributes:
        mask: (batch, tokens) or None; set it before a forward pass to count real tokens only. Modules whose output
            is not (batch, tokens, ...), BERT's one row of positions for example, are then left out.
        active: False stops the counting (during an evaluation in the middle of training, say).
    """

    def __init__(self, model: nn.Module):
        self.mask: Tensor | None = None
        self.active = True
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: tuple = (lambda: None, None)  # weak reference to the last activations, their kurtosis
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in model.named_modules() if name
        ]

    def _hook(self, name: str):
        def add(module: nn.Module, inputs, output) -> None:
            if not self.active:
                return
            activations = output if isinstance(output, Tensor) else output[0]
            if self.mask is not None and activations.shape[:2] != self.mask.shape:
                return
            # A module often returns the very tensor that its last child did (LayerNorm, then the block around it).
            if activations is not self._last[0]():
                self._last = (weakref.ref(activations), sequence_excess_kurtosis(activations, self.mask))
            kurtosis = self._last[1]
            total = kurtosis.sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + kurtosis.numel()

        return add

    def result(self) -> dict[str, float]:
        """Mean excess kurtosis by module name. Modules that never ran are absent."""
        return {name: total.item() / self._counts[name] for name, total in self._sums.items()}

    def state(self) -> dict[str, list]:
        """{module name: [sum, count]}, for a checkpoint."""
        return {name: [total.item(), self._counts[name]] for name, total in self._sums.items()}

    def load_state(self, state: dict[str, list]) -> None:
        """Go on from what `state()` gave."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}

    def remove(self) -> None:
        """Take the hooks out of the model. The sums stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ActivationKurtosis:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()
