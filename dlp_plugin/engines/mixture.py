"""A layer's experts that multiply by what they hold, in the place of transformers' own module.

What it relies on inside transformers, held by ``tests/engines/test_mixtures.py``: what its
decorator ``use_experts_implementation`` gives to a class of experts, and how these are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlp_plugin.engines.linear import SparseLinear

__all__ = ["SparseExperts"]

_GATE = "_apply_gate"  # what transformers calls it, for classes of its own and for others


class SparseExperts(torch.nn.Module):
    """Experts whose Linears stay packed.

    A tensor of transformers' module is a list here: for every expert the Linears that it is made
    of, one behind the other, such as those of gate and up.

    :param experts: transformers' own module, of which the weights are of no use after that
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.activate = getattr(experts, _GATE) if experts.has_gate else experts.act_fn

    @staticmethod
    def can_stand_for(experts: Any) -> bool:
        """Whether transformers' module computes what this one does."""
        shapes = {name for name, each in experts.named_parameters() if each.ndim == 3}
        return (
            getattr(experts, "is_transposed", None) is False
            and not experts.has_bias
            and shapes == {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
        )

    def hold(self, local: str, linears: list[list[SparseLinear]]) -> None:
        """Take the Linears that a tensor of transformers' module is made of, expert by expert."""
        self.add_module(local, torch.nn.ModuleList(map(torch.nn.ModuleList, linears)))

    def names(self, path: str) -> dict[str, list[list[str]]]:
        """Full name of every tensor of transformers' module to those of the Linears, by expert.

        :param path: its own
        """
        found: dict[str, list[list[str]]] = {}
        for name, module in self.named_modules(prefix=path):
            if isinstance(module, SparseLinear):
                expert = name.rpartition(".")[0]
                tensor, _, number = expert.rpartition(".")
                experts = found.setdefault(tensor, [])
                if len(experts) == int(number):
                    experts.append([])
                experts[-1].append(name)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the chosen experts make of tokens ``[tokens, in]``, summed in float32.

        :param top_k_index: numbers of the experts chosen for each token ``[tokens, chosen]``
        :param top_k_weights: what theirs counts for, likewise
        """
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == expert)
            inner = self.activate(self._product(self.first, expert, hidden_states[tokens]))
            found = self._product("down_proj", expert, inner) * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, found.float())
        return total.to(hidden_states.dtype)

    def _product(self, local: str, expert: int, x: Tensor) -> Tensor:
        linears: Any = self.get_submodule(f"{local}.{expert}")
        return torch.cat([each(x) for each in linears], -1)
