"""What the tests of recovery share: pruned models, adapters of every kind, what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

MakeModel = Callable[..., torch.nn.Module]
TARGETS = ["q_proj", "o_proj", "down_proj"]
TOKENS = torch.arange(24).reshape(2, 12)
SOME = "model.layers.0.mlp.down_proj"


@torch.no_grad()
def prune(model: torch.nn.Module, sparsity: float = 0.7, seed: int = 3) -> torch.nn.Module:
    """Set random weights of all Linears and convolutions but the output layer to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)
        if isinstance(module, kinds) and name != "lm_head":
            drawn = torch.rand(module.weight.shape, generator=generator)
            module.weight.masked_fill_(drawn < sparsity, 0)
    return model


@torch.no_grad()
def randomize(peft_model: torch.nn.Module, seed: int = 4) -> torch.nn.Module:
    """As if trained: no part of an adapter is as it was initialised, above all no B zero."""
    torch.manual_seed(seed)
    layers = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper)
    done = set()
    for module in peft_model.modules():
        if isinstance(module, layers):
            for name, value in module.named_parameters():
                mine = "base_layer" not in name and "original_module" not in name
                if mine and id(value) not in done:
                    value += 0.1 * torch.randn_like(value)
                    done.add(id(value))
    return peft_model


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def adapted(model: torch.nn.Module, *configs: peft.PeftConfig) -> torch.nn.Module:
    """Two configurations make two active adapters, default and second."""
    configs = copy.deepcopy(configs)  # peft writes into them
    peft_model = peft.get_peft_model(model, configs[0])
    for config in configs[1:]:
        peft_model.add_adapter("second", config)
        peft_model.base_model.set_adapter(["default", "second"])
    return randomize(peft_model)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    return model(input_ids=TOKENS).logits.float()


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=TOKENS).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def refilled(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """Pruned weights that are not exactly +0 any more."""
    count = 0
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(name if "experts" not in name else owner)
        values = (module.weight if "experts" not in name else getattr(module, parameter))[~mask]
        count += int(((values != 0) | values.signbit()).sum())
    return count


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eoi,eho->nh", x, self.gate_up_proj, self.down_proj)


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(8, 8)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.router(x))


FLAVOURS = {
    "plain": [lora()],
    "rslora": [lora(use_rslora=True)],
    "dora": [lora(use_dora=True)],
    "two": [lora(), lora(r=2, target_modules=["q_proj", "up_proj"])],
    "two dora": [lora(use_dora=True), lora(use_dora=True)],
    "dora and plain": [lora(use_dora=True), lora()],
    "bias": [lora(lora_bias=True)],
    "patterns": [lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32})],
    "embedding": [lora(target_modules=[*TARGETS, "embed_tokens"])],
    "tokens": [lora(trainable_token_indices=[1, 5])],
    "saved": [lora(modules_to_save=["embed_tokens", "lm_head", "norm"])],
    "loha": [peft.LoHaConfig(r=4, target_modules=TARGETS)],
    "lokr": [peft.LoKrConfig(r=4, target_modules=TARGETS)],
    "ia3": [peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])],
    "oft": [peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False)],
    "vera": [peft.VeraConfig(r=4, target_modules=["o_proj"])],
    "boft": [peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS)],
    "osf": [peft.OSFConfig(target_modules=TARGETS)],
}
