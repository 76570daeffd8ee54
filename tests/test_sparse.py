"""Our own class for every dense family: each row of the table, against the dense model and by hand.

A row's proof with copies alone would be blind: experts are permuted in the conversion, and all are
moved apart before they are compared with what each token's experts make by hand. How each is
measured: `sparse_rows.py`, which `examples/sparse_families.py` records.
"""

from collections.abc import Iterator

import pytest
import sparse_rows
import tiny_families as tiny
from sparse_rows import DROPOUTS, ROWS, Row
from tiny import tensors_of

from fusion_upcycle.architectures import moe_family
from fusion_upcycle.architectures.families import NORMS
from fusion_upcycle.live.routers import find_routers, hearing_inputs


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Row]:
    yield sparse_rows.convert(request.param, tmp_path_factory.mktemp("row"))


def test_step_0_is_the_dense_model(row: Row) -> None:
    assert row.made.proof.holds
    assert row.sparse.config.model_type == f"sparse_{row.model_type}"
    assert sparse_rows.step_0(row) <= row.tolerance


def test_every_expert_does_its_part(row: Row) -> None:
    """Router and experts moved apart: each token's output against the formula, by file names."""
    found = sparse_rows.perturbed(row)
    assert found.error <= row.tolerance
    assert found.control > 1e-4 and found.one_expert > 0.01  # it can fail
    assert found.layers == moe_family(row.sparse.config).num_layers(row.sparse.config)


def test_files_keep_their_names_but_for_ffns(row: Row) -> None:
    assert not any(row.info.values()), row.info
    dense = {*tensors_of(row.made.output.parent / "dense")}
    names = {*tensors_of(row.made.output)}
    new = {name for name in names if ".experts." in name or name.endswith(".gate.weight")}
    assert names - new < dense
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


@pytest.mark.parametrize(("model_type", "field"), DROPOUTS)
def test_dropout_is_that_of_the_dense_model(model_type: str, field: str) -> None:
    """Step 0 in evaluation mode cannot see it."""
    variance, ratio = sparse_rows.dropout_ratio(model_type, field)
    assert variance > 1e-6
    assert ratio == pytest.approx(1, abs=0.02)
