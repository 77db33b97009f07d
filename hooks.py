"""Forward hooks that are in a model only inside a `with` block, and the modules of a layer that they go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn


class Hooks:
    """Forward hooks on modules. `with` puts them into the model and takes them out again; it can be entered repeatedly.

    Args:
        hooks: pairs of a module and its hook, a function of (module, inputs, output).
        first: the hooks run before those that the modules have already.
    """

    def __init__(self, hooks: Iterable[tuple[nn.Module, Callable]], first: bool = False):
        self._hooks = list(hooks)
        self._first = first
        self._handles: list = []

    def __enter__(self):
        self._handles = [module.register_forward_hook(hook, prepend=self._first) for module, hook in self._hooks]
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def modules_by_layer(model: nn.Module, suffix: str) -> Iterator[tuple[str, nn.Module]]:
    """(`layer.<i>`, the module whose name ends in `layer.<i>.<suffix>`) of every layer that has such a module."""
    for name, module in model.named_modules():
        if match := re.search(rf"\b(layer\.\d+)\.{re.escape(suffix)}$", name):
            yield match[1], module
