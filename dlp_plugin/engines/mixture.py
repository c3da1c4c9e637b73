"""Packed experts of a layer, in place of transformers' module of experts.

The code relies on two details of transformers, which ``tests/engines/test_mixtures.py`` checks:
the attributes that its decorator ``use_experts_implementation`` adds to a class of experts, and
the arguments that such a class is called with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlp_plugin.engines.linear import SparseLinear

__all__ = ["SparseExperts"]

_GATE = "_apply_gate"  # method that applies the gate in all of transformers' classes of experts


class SparseExperts(torch.nn.Module):
    """Experts whose Linears stay packed.

    Each fused tensor of transformers' module is a list here. It holds, for every expert, the
    Linears whose rows are concatenated in the tensor, such as gate and up.

    :param experts: transformers' module; its weights are not used any more
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.activate = getattr(experts, _GATE) if experts.has_gate else experts.act_fn

    @staticmethod
    def can_stand_for(experts: Any) -> bool:
        """Whether this class computes the same as transformers' module.

        :param experts: transformers' module
        """
        shapes = {name for name, each in experts.named_parameters() if each.ndim == 3}
        return (
            getattr(experts, "is_transposed", None) is False
            and not experts.has_bias
            and shapes == {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
        )

    def hold(self, local: str, linears: list[list[SparseLinear]]) -> None:
        """Set the Linears that replace a fused tensor of transformers' module.

        :param local: local name of the tensor
        :param linears: for every expert the Linears whose rows the tensor concatenates
        """
        self.add_module(local, torch.nn.ModuleList(map(torch.nn.ModuleList, linears)))

    def names(self, path: str) -> dict[str, list[list[str]]]:
        """Map the fused tensors of transformers' module to the Linears that replace them.

        :param path: full name of this module
        :return: full name of every tensor to the full names of its Linears, one list per expert
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
        """Add up the outputs of the chosen experts by their weights, in float32.

        :param hidden_states: ``[tokens, in]``
        :param top_k_index: ``[tokens, chosen]``, indices of the experts chosen for each token
        :param top_k_weights: ``[tokens, chosen]``, weights of these experts' outputs
        :return: ``[tokens, in]`` in the dtype of ``hidden_states``
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
