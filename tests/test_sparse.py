"""Our own class for every dense family: each row of the table, against the dense model and by hand.

A row's proof with copies alone would be blind: experts are permuted in the conversion, and all are
moved apart before they are compared with what each token's experts make by hand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch
import torch.nn.functional as F
from tiny import tensors_of
from torch import Tensor
from transformers import PreTrainedModel

import fusion_upcycle.models as models
from fusion_upcycle import upcycle
from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.families import NORMS
from fusion_upcycle.conversion.output import Converted
from fusion_upcycle.live.routers import find_routers, hearing_inputs
from fusion_upcycle.live.tensors import LiveTensors
from fusion_upcycle.models.modeling_sparse import FAMILIES, SparseMLP

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


@dataclass
class Row:
    name: str
    model_type: str
    dense: PreTrainedModel
    made: Converted
    sparse: PreTrainedModel
    info: Mapping[str, Any]

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dense.dtype == torch.float64 else 1e-5


def load(folder: Path, dense: PreTrainedModel) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    kind = models.model_class(type(dense))
    found: Any = kind.from_pretrained(
        folder, output_loading_info=True, dtype=dense.dtype, experts_implementation="eager"
    )  # torch's grouped product knows no float64
    return found[0].eval(), found[1]


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Row]:
    model_type, fields = ROWS[request.param]
    folder = tmp_path_factory.mktemp("row")
    dense = tiny.dense(model_type, **fields)
    if model_type == "xglm":  # whose own mask is beyond float64
        dense = dense.float()
    dense.save_pretrained(folder / "dense")
    dense = type(dense).from_pretrained(folder / "dense", dtype=dense.dtype).eval()
    made = upcycle(
        folder / "dense",
        folder / "moe",
        target="sparse",
        num_experts=4,
        experts_per_token=2,
        expert_init="permute",
        verify="layers",
        progress=False,
    )
    yield Row(request.param, model_type, dense, made, *load(made.output, dense))


def test_step_0_is_the_dense_model(row: Row) -> None:
    assert row.made.proof.holds
    assert row.sparse.config.model_type == f"sparse_{row.model_type}"
    given = tiny.inputs(row.dense)
    expected = tiny.output(row.dense, **given)
    difference = (tiny.output(row.sparse, **given) - expected).abs().max()
    assert difference <= row.tolerance * max(1, expected.abs().max())


def test_files_keep_their_names_but_for_ffns(row: Row) -> None:
    assert not any(row.info.values()), row.info
    dense = {*tensors_of(row.made.output.parent / "dense")}
    names = {*tensors_of(row.made.output)}
    new = {name for name in names if ".experts." in name or name.endswith(".gate.weight")}
    assert names - new < dense
    row.sparse.config.architectures = [type(row.sparse).__name__]
    family = moe_family(row.sparse.config)
    layers = family.num_layers(row.sparse.config)
    assert len(new) == layers * (4 * len(family.parts) + 1)
    ffns = dense - names
    assert len(ffns) % layers == 0
    prefixes = tuple(family.layer_prefix(row.sparse.config, i) for i in range(layers))
    assert all(name.startswith(prefixes) for name in ffns)
    assert sum(dense_size(row, ffns).values()) * 4 == sum(
        tensor.numel()
        for name, tensor in tensors_of(row.made.output).items()
        if ".experts." in name
    )


def dense_size(row: Row, names: set[str]) -> dict[str, int]:
    tensors = tensors_of(row.made.output.parent / "dense")
    return {name: tensors[name].numel() for name in names}


def test_every_expert_does_its_part(row: Row) -> None:
    """Router and experts moved apart: each token's output against the formula, by file names."""
    sparse, _ = load(row.made.output, row.dense)
    torch.manual_seed(5)
    family = moe_family(sparse.config)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = family.layer_modules(sparse, family.experts_module.rpartition(".")[0])
    for layer, block in blocks.items():
        assert isinstance(block, SparseMLP)
        for parameter in (*block.experts.parameters(), block.gate.weight):
            parameter.data += 0.2 * torch.randn_like(parameter)
        block.register_forward_hook(
            # A copy: Falcon's layers add to it.
            lambda _, args, output, at=layer: seen.update({at: (args[0], output.clone())}) and None
        )
    tiny.output(sparse, **tiny.inputs(sparse))
    sparse.config.architectures = [type(sparse).__name__]
    files = LiveTensors(sparse, moe_family(sparse.config), family_names(sparse))
    assert len(seen) == len(blocks) == family.num_layers(sparse.config)
    for layer, (x, output) in seen.items():
        expected = by_hand(sparse, files, layer, x)
        size = expected.abs().max()
        assert (output.flatten(0, -2) - expected).abs().max() <= row.tolerance * max(1, size)
        assert (output.flatten(0, -2) - 1.001 * expected).abs().max() > 1e-4 * size  # it can fail
        _, _, chosen = blocks[layer].gate(x)
        blocks[layer].experts.down_proj.data[chosen.flatten().mode().values] *= 1.5
        assert (by_hand(sparse, files, layer, x) - expected).abs().max() > 0.01 * size


def family_names(model: PreTrainedModel) -> list[str]:
    return [*moe_family(model.config).slots]


def by_hand(model: PreTrainedModel, files: LiveTensors, layer: int, x: Tensor) -> Tensor:
    """What a layer's MoE makes of each token, [N, D], from tensors by their names in the files."""
    family, x = moe_family(model.config), x.flatten(0, -2)
    prefix = family.layer_prefix(model.config, layer)
    block: Any = family.layer_modules(model, family.experts_module.rpartition(".")[0])[layer]
    scores = (x @ files.tensor(prefix + family.router_name).T).softmax(-1)
    outputs = []
    for expert in range(4):
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


def test_the_size_of_the_router_s_inputs_is_that_of_its_norm(row: Row) -> None:
    """By which `router_init=normal` makes logits of a given size."""
    routers, seen = find_routers(row.sparse), {}
    with hearing_inputs(routers.modules, lambda layer, x: seen.update({layer: x})):
        tiny.output(row.sparse, **tiny.inputs(row.sparse, rows=8))
    routers.close()
    if not NORMS[row.model_type] and row.model_type not in ("olmo", "nanochat"):
        return  # the residual stream itself, taken to be of size 1
    rows = {layer: module.weight for layer, module in routers.modules.items()}
    for layer, x in seen.items():
        spread = (x @ rows[layer].T).std()
        assert 0.4 < spread < 1.8, (layer, spread)


def test_router_logits_have_gradients(row: Row) -> None:
    routers = find_routers(row.sparse)
    with routers.listening() as heard:
        row.sparse(**tiny.inputs(row.sparse))
    routers.close()
    assert (
        len(heard.logits)
        == len(routers.modules)
        == moe_family(row.sparse.config).num_layers(row.sparse.config)
    )
    assert all(logits.requires_grad for logits in heard.logits)
    assert all(chosen.shape[-1] == 2 for chosen in heard.chosen)


DROPOUTS = {
    (name, field)
    for name, forms in FAMILIES.items()
    for field in (forms[0].dropout, forms[0].inner_dropout)
    if field is not None
}


@pytest.mark.parametrize(("model_type", "field"), sorted(DROPOUTS))
def test_dropout_is_that_of_the_dense_model(model_type: str, field: str) -> None:
    """Variance over 8192 passes of one token; step 0 in evaluation mode cannot see it.

    With one expert per token: of several, each drops neurons by itself.
    """
    one_layer = {"gpt2": "n_layer", "gptj": "n_layer", "codegen": "n_layer"}
    layers = {one_layer.get(model_type, "num_hidden_layers"): 1}
    if model_type == "gpt_neo":
        layers = {
            "num_layers": 1,
            "num_hidden_layers": 1,
            "attention_types": [[["global"], 1]],
            "attention_layers": ["global"],
        }
    if model_type in ("t5", "xglm"):
        layers = {"num_layers": 1}
    if model_type == "modernbert":
        layers |= {"layer_types": ["full_attention"]}
    dense = tiny.dense(model_type, **layers).float()
    for name in vars(dense.config):
        if "drop" in name and isinstance(getattr(dense.config, name), float):
            setattr(dense.config, name, 0.0)
    setattr(dense.config, field, 0.5)
    dense = _again(dense, type(dense))
    sparse = _sparse_of(dense)
    variance = []
    for model in (dense, sparse):
        torch.manual_seed(0)
        model.train()
        given = {name: ids[:1, :1].expand(8192, 1) for name, ids in tiny.inputs(model).items()}
        variance.append(tiny.output(model, **given).var(0).mean())
    assert variance[0] > 1e-6
    assert variance[1] / variance[0] == pytest.approx(1, abs=0.02)


def _again(model: PreTrainedModel, kind: type) -> PreTrainedModel:
    """A model of the same config and weights, made anew."""
    made = kind._from_config(model.config, dtype=model.dtype)
    made.load_state_dict(model.state_dict())
    return made


def _sparse_of(dense: PreTrainedModel) -> PreTrainedModel:
    from fusion_upcycle.conversion.run import to_model
    from fusion_upcycle.upcycling.options import make_options
    from fusion_upcycle.upcycling.run import plan_model

    options = make_options(target="sparse", num_experts=2, experts_per_token=1)
    moe, proof = to_model(plan_model(dense.eval(), options), dense, verify="layers")
    assert proof.holds
    return moe
