"""Every pair of families with experts that all differ, in float64, against the dense class itself.

At step 0 all experts are the same, so that no proof of exactness sees which of them a token gets,
nor with what weight. Here the reference is the dense model, whose FFN is run once per expert with
the tensors that the MoE's files have under that expert's names, weighted by our `RoutingRule`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert
from tiny import dense_folder, load, logits_of, tensors_of
from torch import Tensor, nn

from fusion_upcycle.architectures import ARCHITECTURES, OWN
from fusion_upcycle.architectures.base import Architecture, DenseLayout
from fusion_upcycle.architectures.routing import RoutingRule, routing_rule
from fusion_upcycle.experts import EXPERT_PARTS

#: Not those whose dense files have fused FFNs; of ours, test_sparse.py has every row.
PAIRS = [
    (dense, target)
    for target, family in ARCHITECTURES.without(OWN).items()
    for dense, layout in family.dense.items()
    if layout.splits is None
]


class Mixture(nn.Module):
    """The experts that the rule chooses, each computed by a dense FFN, for every token."""

    def __init__(self, experts: list[nn.Module], router_ED: Tensor, rule: RoutingRule):
        super().__init__()
        self.experts, self.router_ED, self.rule = experts, router_ED, rule

    def forward(self, hidden: Tensor) -> Tensor:
        flat_ND = hidden.flatten(0, -2)
        weights_NK, chosen_NK = self.rule.route(flat_ND @ self.router_ED.to(flat_ND).T)
        all_NED = torch.stack([expert(flat_ND) for expert in self.experts], dim=1)
        index_NKD = chosen_NK[..., None].expand(-1, -1, flat_ND.shape[-1])
        return (all_NED.gather(1, index_NKD) * weights_NK[..., None]).sum(1).view(hidden.shape)


def mixed(
    dense: Any, config: Any, family: Architecture, layout: DenseLayout, files: dict[str, Tensor]
) -> Any:
    """The dense model with a `Mixture` in the place of each FFN, of the tensors in the files."""
    dense = copy.deepcopy(dense)
    for number, layer in enumerate(dense.model.layers):
        prefix = f"model.layers.{number}."
        place = layout.ffn["gate_proj_FD"].split(".")[0]
        experts = []
        for expert in range(4):
            ffn = copy.deepcopy(layer.get_submodule(place))
            for part in EXPERT_PARTS:
                weight = ffn.get_parameter(layout.ffn[part].removeprefix(f"{place}."))
                found = family.place(expert, part, weight.numel())
                whole = files[prefix + found.name].flatten()
                weight.data = whole[found.start : found.stop].view(weight.shape)
            experts.append(ffn)
        bias = family.routing.selection_bias
        rule = routing_rule(config, None if bias is None else files[prefix + bias].double())
        layer.set_submodule(place, Mixture(experts, files[prefix + family.router_name], rule))
    return dense


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_each_token_gets_its_experts_with_their_weights(
    source: str, target: str, tmp_path: Path
) -> None:
    family = ARCHITECTURES[target]
    dense_folder(tmp_path / "dense", source, dtype=torch.float64)
    shared = "none" if family.shared is None else "zero"
    convert(tmp_path / "dense", tmp_path / "moe", target=target, shared_expert=shared)
    moe = load(tmp_path / "moe")
    sizes = dict.fromkeys(family.packed_names, 0.2) | {family.live_router_name: 0.2}
    sizes |= {family.live_bias_name: 0.1} if family.live_bias_name else {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in moe.state_dict().items():  # biases are buffers in some families
        for ending, size in sizes.items():
            if name.endswith(ending):
                tensor += size * torch.randn(tensor.shape, generator=generator)
    moe.set_experts_implementation("eager")  # the default one has no float64
    moe.save_pretrained(tmp_path / "perturbed")

    dense, files = load(tmp_path / "dense"), tensors_of(tmp_path / "perturbed")
    layout = family.dense[source]
    expected = logits_of(mixed(dense, moe.config, family, layout, files))
    found = logits_of(moe)
    scale = expected.abs().max()
    # Routers are float32 in transformers, whatever the model is.
    assert (found - expected).abs().max() <= 2e-6 * scale
    assert (logits_of(dense) - expected).abs().max() > 0.05 * scale  # it is seen at all
