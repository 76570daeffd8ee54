"""What is asked of every row of the table of our own class, measured; tests and a record use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_families as tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import fusion_upcycle.models as models
from fusion_upcycle import upcycle
from fusion_upcycle.architectures import moe_family
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.live.tensors import LiveTensors
from fusion_upcycle.models.modeling_sparse import FAMILIES, SparseMLP
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_model

#: Forms that a table of one row per family does not show.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5 without a gate": ("t5", {"feed_forward_proj": "relu"}),
    "dinov2 with SwiGLU": ("dinov2", {"use_swiglu_ffn": True}),
    "opt with norms behind": ("opt", {"do_layer_norm_before": False}),
    "falcon, not parallel": ("falcon", {"parallel_attn": False, "alibi": True}),
    "gpt_neox, not parallel": ("gpt_neox", {"use_parallel_residual": False}),
    "llama with biases": ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
}
ROWS = {name: (name, {}) for name in FAMILIES} | VARIANTS
NUM_EXPERTS = 4


@dataclass
class Row:
    """One row, converted from folder to folder with permuted experts, and loaded again.

    Attributes:
        info: what transformers says of loading.
    """

    name: str
    model_type: str
    dense: PreTrainedModel
    made: Converted
    sparse: PreTrainedModel
    info: Mapping[str, Any]

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dense.dtype == torch.float64 else 1e-5


def convert(name: str, folder: Path) -> Row:
    """A row of `ROWS` in float64, with a random router of top-2."""
    model_type, fields = ROWS[name]
    dense = tiny.dense(model_type, **fields)
    if model_type == "xglm":  # whose own mask is beyond float64
        dense = dense.float()
    dense.save_pretrained(folder / "dense")
    dense = type(dense).from_pretrained(folder / "dense", dtype=dense.dtype).eval()
    made = upcycle(
        folder / "dense",
        folder / "moe",
        target="sparse",
        num_experts=NUM_EXPERTS,
        experts_per_token=2,
        expert_init="permute",
        verify="layers",
        progress=False,
    )
    return Row(name, model_type, dense, made, *load(made.output, dense))


def load(folder: Path, dense: PreTrainedModel) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    kind = models.model_class(type(dense))
    found: Any = kind.from_pretrained(
        folder, output_loading_info=True, dtype=dense.dtype, experts_implementation="eager"
    )  # torch's grouped product knows no float64
    return found[0].eval(), found[1]


def step_0(row: Row) -> float:
    """Largest difference of the outputs over the largest output."""
    given = tiny.inputs(row.dense)
    expected = tiny.output(row.dense, **given)
    difference = (tiny.output(row.sparse, **given) - expected).abs().max()
    return (difference / max(1, expected.abs().max())).item()


@dataclass(frozen=True)
class Perturbed:
    """Each token's output against the formula, once all experts and routers differ.

    Attributes:
        error: largest difference over the largest output, worst layer.
        control: the same against 1.001 times the formula, best layer.
        one_expert: change of the formula as one expert's `down` grows by half, smallest.
        layers: that were looked at.
    """

    error: float
    control: float
    one_expert: float
    layers: int


def perturbed(row: Row) -> Perturbed:
    sparse, _ = load(row.made.output, row.dense)
    torch.manual_seed(5)
    family = moe_family(sparse.config)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    blocks: Any = family.layer_modules(sparse, family.experts_module.rpartition(".")[0])
    for layer, block in blocks.items():
        assert isinstance(block, SparseMLP)
        for parameter in (*block.experts.parameters(), block.gate.weight):
            parameter.data += 0.2 * torch.randn_like(parameter)
        block.register_forward_hook(
            # A copy: Falcon's layers add to it.
            lambda _, args, output, at=layer: seen.update({at: (args[0], output.clone())}) and None
        )
    tiny.output(sparse, **tiny.inputs(sparse))
    files = LiveTensors(sparse, family, [*family.slots])
    errors, controls, changes = [], [], []
    for layer, (x, output) in seen.items():
        expected = by_hand(sparse, files, layer, x)
        size, found = max(1, expected.abs().max()), output.flatten(0, -2)
        errors.append(((found - expected).abs().max() / size).item())
        controls.append(((found - 1.001 * expected).abs().max() / size).item())
        _, _, chosen = blocks[layer].gate(x)
        blocks[layer].experts.down_proj.data[chosen.flatten().mode().values] *= 1.5
        changed = by_hand(sparse, files, layer, x)
        changes.append(((changed - expected).abs().max() / size).item())
    return Perturbed(max(errors), min(controls), min(changes), len(seen))


def by_hand(model: PreTrainedModel, files: LiveTensors, layer: int, x: Tensor) -> Tensor:
    """What a layer's MoE makes of each token, [N, D], from tensors by their names in the files."""
    family, x = moe_family(model.config), x.flatten(0, -2)
    prefix = family.layer_prefix(model.config, layer)
    block: Any = family.layer_modules(model, family.experts_module.rpartition(".")[0])[layer]
    scores = (x @ files.tensor(prefix + family.router_name).T).softmax(-1)
    outputs = []
    for expert in range(NUM_EXPERTS):
        part = {
            name: files.tensor(prefix + pattern.format(expert=expert))
            for name, pattern in family.expert_names.items()
        }
        inside = F.linear(x, part["up_proj_FD"], part.get("up_bias_F"))
        if "gate_proj_FD" in part:
            gate = F.linear(x, part["gate_proj_FD"], part.get("gate_bias_F"))
            inside = block.experts._activation[0](gate) * inside
        else:
            inside = block.experts._activation[0](inside)
        outputs.append(F.linear(inside, part["down_proj_DF"], part.get("down_bias_D")))
    result = torch.zeros_like(x)
    for token, best in enumerate(scores.topk(2, -1).indices):
        weights = scores[token, best] / scores[token, best].sum()
        result[token] = sum(w * outputs[e][token] for w, e in zip(weights, best, strict=True))
    return result


#: Families and the fields of the dropouts inside their FFNs.
DROPOUTS = sorted(
    {
        (name, field)
        for name, forms in FAMILIES.items()
        for field in (forms[0].dropout, forms[0].inner_dropout)
        if field is not None
    }
)

_ONE_LAYER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1},
    "gptj": {"n_layer": 1},
    "codegen": {"n_layer": 1},
    "gpt_neo": {
        "num_layers": 1,
        "num_hidden_layers": 1,
        "attention_types": [[["global"], 1]],
        "attention_layers": ["global"],
    },
    "t5": {"num_layers": 1},
    "xglm": {"num_layers": 1},
    "modernbert": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
}


def dropout_ratio(model_type: str, field: str, passes: int = 8192) -> tuple[float, float]:
    """Variance of the output over passes of one token with one dropout at 0.5: dense, and ratio.

    With one expert per token: of several, each drops neurons by itself.
    """
    layers = _ONE_LAYER.get(model_type, {"num_hidden_layers": 1})
    dense = tiny.dense(model_type, **layers).float()
    for name in vars(dense.config):
        if "drop" in name and isinstance(getattr(dense.config, name), float):
            setattr(dense.config, name, 0.0)
    setattr(dense.config, field, 0.5)
    again = type(dense)._from_config(dense.config, dtype=dense.dtype)
    again.load_state_dict(dense.state_dict())
    options = make_options(target="sparse", num_experts=2, experts_per_token=1)
    sparse, proof = to_model(plan_model(again.eval(), options), again, verify="layers")
    assert proof.holds
    variance = []
    for model in (again, sparse):
        torch.manual_seed(0)
        model.train()
        given = {name: x[:1].expand(passes, *x.shape[1:]) for name, x in _one(model).items()}
        variance.append(tiny.output(model, **given).var(0).mean().item())
    return variance[0], variance[1] / variance[0]


def _one(model: PreTrainedModel) -> dict[str, Tensor]:
    """One token of each input."""
    return {name: ids[:1, :1] for name, ids in tiny.inputs(model).items()}
