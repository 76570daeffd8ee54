"""The proof: it fails when it should, and its streamed models are transformers' own."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert
from tiny import (
    as_older,
    dense_folder,
    dense_model,
    edit_config,
    edit_tensors,
    files_of,
    load,
    logits_of,
    token_ids,
)
from transformers import LlamaConfig

from fusion_upcycle import UpcyclingOptions
from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.architectures.config import readable_config
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.writer import write_shards
from fusion_upcycle.cli import main
from fusion_upcycle.conversion.run import to_model
from fusion_upcycle.errors import ProofError, UpcyclingError
from fusion_upcycle.upcycling.run import plan_folder, plan_model
from fusion_upcycle.verification.function import distance, take_sample
from fusion_upcycle.verification.proof import resolve_mode
from fusion_upcycle.verification.streamed_model import streamed_model
from fusion_upcycle.verify import verify

FP32, BF16 = torch.float32, torch.bfloat16
MIXTRAL = ARCHITECTURES["mixtral"]

both_modes = pytest.mark.parametrize("mode", ["layers", "logits"])
both_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def not_proven(source: Path, mode: str, match: str | None = None, **options: Any) -> None:
    """The conversion fails its proof and leaves no output."""
    with pytest.raises(ProofError, match=match):
        convert(source, source.parent / "out", verify=mode, **options)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def flip_a_bit(path: Path, place: int = -100) -> None:
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Mistral in float32, whose sliding window the proof's tokens exceed."""
    return dense_folder(tmp_path / "dense", "mistral")


@pytest.fixture
def output(source: Path) -> Path:
    """An intact output of `source`."""
    return convert(source, source.parent / "out").output


# --- a proof can fail -------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("expert_init", ["copy", "noise"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_one_flipped_bit_on_disk_is_found(
    max_shard_size: str,
    expert_init: str,
    mode: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_badly(staging: Path, *rest: Any) -> None:
        write_shards(staging, *rest)
        flip_a_bit(sorted(staging.glob("*.safetensors"))[-1])

    monkeypatch.setattr("fusion_upcycle.conversion.output.write_shards", write_badly)
    options = {"expert_init": expert_init, "max_shard_size": max_shard_size}
    not_proven(source, mode, match="differs from its origin", **options)


@both_modes
@both_dtypes
def test_experts_under_swapped_names_are_found(
    dtype: torch.dtype, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = dict(MIXTRAL.expert_names)
    names["gate_proj_FD"], names["up_proj_FD"] = names["up_proj_FD"], names["gate_proj_FD"]
    broken = dataclasses.replace(MIXTRAL, expert_names=names)
    monkeypatch.setitem(ARCHITECTURES, "mixtral", broken)
    not_proven(dense_folder(tmp_path / "dense", dtype=dtype), mode)


@both_modes
@both_dtypes
@pytest.mark.parametrize(
    "change",
    [{"sliding_window": None}, {"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_theta": 1e6}}],
    ids=str,
)
def test_a_config_field_lost_in_planning_is_found(
    change: dict[str, Any],
    dtype: torch.dtype,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(*arguments: Any) -> Any:
        config = MIXTRAL.convert_config(*arguments)
        return type(config)(**config.to_dict() | change)

    broken = dataclasses.replace(MIXTRAL, convert_config=lose)
    monkeypatch.setitem(ARCHITECTURES, "mixtral", broken)
    not_proven(dense_folder(tmp_path / "dense", "mistral", dtype=dtype), mode, match="NOT exact")


def lose_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*arguments: Any) -> Any:
        config = MIXTRAL.convert_config(*arguments)
        return type(config)(**config.to_dict() | {"sliding_window": None})

    broken = dataclasses.replace(MIXTRAL, convert_config=lose)
    monkeypatch.setitem(ARCHITECTURES, "mixtral", broken)


@both_modes
def test_a_lost_window_that_the_tokens_do_not_reach_is_found(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_window(monkeypatch)
    source = dense_folder(tmp_path / "dense", "mistral", sliding_window=4096)
    not_proven(source, mode, match="sliding_window=None, not 4096")


@both_modes
@pytest.mark.parametrize("expert_init", ["noise", "drop"])
def test_what_is_lost_beside_the_experts_is_found_when_they_are_only_approximate(
    expert_init: str, mode: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_window(monkeypatch)
    not_proven(source, mode, match="NOT exact", expert_init=expert_init)


@both_modes
@both_dtypes
@pytest.mark.parametrize("field", ["sliding_window", "rms_norm_eps"])
def test_a_field_lost_in_writing_config_json_is_found(
    field: str,
    dtype: torch.dtype,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(config: Any) -> dict[str, Any]:
        return {key: value for key, value in readable_config(config).items() if key != field}

    monkeypatch.setattr("fusion_upcycle.conversion.output.readable_config", lose)
    not_proven(dense_folder(tmp_path / "dense", "mistral", dtype=dtype), mode)


@both_dtypes
def test_live_experts_in_swapped_slots_are_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = type(MIXTRAL).live_slot

    def swapped(self: Any, name: str, size: int) -> Any:
        parameter, index = right(self, name, size)
        if len(index) == 2:
            rows = slice(0, size) if index[1].start else slice(size, 2 * size)
            index = (index[0], rows)
        return parameter, index

    monkeypatch.setattr(type(MIXTRAL), "live_slot", swapped)
    dense = dense_model(dtype=dtype)
    with pytest.raises(ProofError):
        to_model(plan_model(dense, UpcyclingOptions()), dense, verify="logits")


@both_modes
def test_a_router_that_is_not_a_number_is_found(mode: str, source: Path) -> None:
    def broken(size: int, generator: torch.Generator) -> torch.Tensor:
        return torch.full((size,), float("nan"))

    with pytest.raises(UpcyclingError, match=r"block_sparse_moe\.gate\.weight .* not a number"):
        convert(source, source.parent / "out", verify=mode, router_init=broken)
    assert not (source.parent / "out").exists()


def test_a_zero_that_became_minus_zero_is_found(source: Path) -> None:
    edit_tensors(source, lambda t: t["model.norm.weight"].zero_())
    output = convert(source, source.parent / "out").output
    edit_tensors(as_older(output), lambda t: t["model.norm.weight"].neg_())
    with pytest.warns(UserWarning), pytest.raises(ProofError, match=r"model\.norm\.weight differs"):
        verify(output, progress=False)


# --- a proof can hold -------------------------------------------------------------------------


@both_modes
@both_dtypes
def test_an_exact_conversion_is_proven(dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", "mistral", dtype=dtype)
    proof = convert(source, tmp_path / "out", verify=mode).proof
    assert (proof.mode, proof.claim, proof.holds) == (mode, "exact", True)
    assert proof.function is not None
    assert proof.function["max_abs"] < 1e-4 * proof.function["scale"]
    assert proof.function["argmax_agreement"] == 1


def test_the_proof_compares_every_tensor(source: Path, tmp_path: Path) -> None:
    proof = convert(source, tmp_path / "out", expert_init="noise", verify="auto").proof
    assert proof.tensors == {
        "bit_equal_to_source": 3 + 2 * 6,
        "bit_equal_to_second_draw": 2 * (4 * 3 + 1),
    }


def test_the_layers_proof_compares_every_layer(source: Path, tmp_path: Path) -> None:
    layers = convert(source, tmp_path / "out", verify="layers").proof.details["layers"]
    assert layers is not None
    assert layers["compared"] == 2


def test_a_conversion_without_proof_is_recorded_as_unproven(source: Path, tmp_path: Path) -> None:
    converted = convert(source, tmp_path / "out", verify="none")
    assert converted.proof.holds is None
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["proof"] == {"mode": "none", "claim": "exact", "wall_seconds": 0.0}
    assert "unproven" in record["proof_in_words"]
    assert "not verified" in (tmp_path / "out" / "README.md").read_text()


def test_the_proof_is_in_the_record(source: Path, tmp_path: Path) -> None:
    converted = convert(source, tmp_path / "out", verify="auto")
    record = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    assert record["proof"] == json.loads(json.dumps(converted.proof.to_json()))
    assert record["proof"]["holds"] is True


# --- the streamed models ----------------------------------------------------------------------

STREAMED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "rope": "llama3"}),
    ("mistral", {"rope": "yarn", "head_dim": 12}),
    ("llama", {"rope": "dynamic"}),
]


@pytest.mark.parametrize(("family", "fields"), STREAMED, ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_streamed_model_has_the_logits_of_the_loaded_one(
    kind: str, family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense", family, **fields)
    # Different experts and a strong router, so that a mix-up of experts or tokens shows.
    router = {"name": "normal", "std": 1.0}
    convert(source, tmp_path / "moe", expert_init="drop", router_init=router)
    planned = plan_folder(source, UpcyclingOptions(router_init=router))
    config, architecture = planned.config, planned.architecture
    if kind == "dense":
        config, architecture = planned.source_config, None
    reader = CheckpointReader(tmp_path / kind)
    streamed = streamed_model(config, reader, architecture, FP32, FP32)
    with torch.inference_mode():
        found = streamed(token_ids(), use_cache=False).logits
    torch.testing.assert_close(found, logits_of(load(tmp_path / kind)), atol=2e-5, rtol=0)


def test_a_streamed_model_holds_no_weights_after_running(source: Path) -> None:
    planned = plan_folder(source, UpcyclingOptions())
    streamed = streamed_model(planned.source_config, planned.source, None, FP32, FP32)
    with torch.inference_mode():
        streamed(token_ids(), use_cache=False)
    assert all(parameter.is_meta for parameter in streamed.parameters())


# --- verify -----------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda out: flip_a_bit(out / "model.safetensors"),
    "a lost tensor": lambda out: edit_tensors(out, lambda t: t.pop("model.norm.weight")),
    "a stray tensor": lambda out: edit_tensors(out, lambda t: t.update(x=torch.ones(2))),
    "another dtype": lambda out: edit_tensors(
        out, lambda t: t.update({n: x.bfloat16() for n, x in t.items()})
    ),
    "no sliding window": lambda out: edit_config(out, sliding_window=None),
    "another top-k": lambda out: edit_config(out, num_experts_per_tok=1),
    "another eps": lambda out: edit_config(out, rms_norm_eps=1e-2),
    "a file cut off": lambda out: (out / "model.safetensors").write_bytes(
        (out / "model.safetensors").read_bytes()[:-8]
    ),
}


@both_modes
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_verify_finds_a_damaged_output(
    damage: Callable[[Path], object], mode: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(as_older(output))  # digests would find it at once
    with pytest.warns(UserWarning, match="no digests"), pytest.raises(SystemExit) as exit_:
        main(["verify", str(output), "--mode", mode, "--quiet"])
    assert exit_.value.code == 1
    assert "error: " in capsys.readouterr().err


def test_verify_finds_a_missing_config(output: Path) -> None:
    """Without it transformers would make, and fill with memory, the default Mixtral of 47B."""
    (as_older(output) / "config.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(UpcyclingError, match=r"config\.json"):
        verify(output, mode="layers", progress=False)


@both_modes
def test_verify_passes_an_intact_output(
    mode: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(output), "--mode", mode, "--quiet"])
    assert "exact, proven" in capsys.readouterr().out


def test_verify_changes_nothing(output: Path) -> None:
    before = files_of(output.parent)
    verify(output, progress=False)
    assert files_of(output.parent) == before


def test_verify_repeats_random_draws(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", expert_init="drop", seed=9, dtype="bfloat16")
    proof = verify(tmp_path / "out", progress=False)
    assert proof.tensors is not None
    assert proof.tensors["bit_equal_to_second_draw"] == 2 * (4 * 3 + 1)


def test_verify_finds_the_source_where_it_is_now(source: Path, output: Path) -> None:
    moved = source.rename(source.with_name("moved"))
    assert verify(output, moved, progress=False).holds


def test_verify_says_when_the_source_is_gone(source: Path, output: Path) -> None:
    shutil.rmtree(source)
    with pytest.raises(UpcyclingError, match="dense does not exist"):
        verify(output, progress=False)


def test_verify_finds_another_source_at_the_same_place(source: Path, output: Path) -> None:
    dense_folder(source, "mistral", seed=1)
    with pytest.raises(ProofError, match="differs from its origin"):
        verify(output, progress=False)


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"options": 5}', '{"source": {}}'])
def test_verify_refuses_a_damaged_record(contents: str, output: Path) -> None:
    (output / "upcycling.json").write_text(contents)
    with pytest.raises(UpcyclingError, match=r"upcycling\.json"):
        verify(output, progress=False)


def test_verify_reads_the_record_of_an_older_version(output: Path) -> None:
    path = as_older(output) / "upcycling.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"options": record["options"] | {"scaling": "exact"}}))
    with pytest.warns(UserWarning, match="its tokenizer and other files are not looked at"):
        assert verify(output, progress=False).holds
    path.write_text(json.dumps(record | {"options": record["options"] | {"scaling": "megatron"}}))
    with (
        pytest.warns(UserWarning),
        pytest.raises(UpcyclingError, match=r"^The record.*older version with scaling=megatron"),
    ):
        verify(output, progress=False)


def test_verify_refuses_a_folder_that_is_not_ours(source: Path) -> None:
    with pytest.raises(UpcyclingError, match="not an output of ours"):
        verify(source, progress=False)


def test_verify_refuses_to_verify_nothing(output: Path) -> None:
    with pytest.raises(UpcyclingError, match="layers, logits or auto"):
        verify(output, mode="none")


# --- its parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_distance_that_is_no_number_is_not_within_tolerance(value: float) -> None:
    reference, other = torch.ones(2, 3), torch.ones(2, 3)
    other[0, 0] = value
    assert not distance(reference, other, logits=True).within_tolerance
    assert not distance(other, reference, logits=True).within_tolerance
    assert not distance(other, other.clone(), logits=True).within_tolerance


@pytest.mark.parametrize(("error", "within"), [(0.0, True), (0.9e-4, True), (1.1e-4, False)])
def test_the_tolerance_is_relative_to_the_largest_output(error: float, within: bool) -> None:
    reference = torch.tensor([[50.0, -200.0, 1.0]], dtype=torch.float64)
    other = reference + torch.tensor([0.0, 0.0, 200.0 * error], dtype=torch.float64)
    assert distance(reference, other, logits=True).within_tolerance is within


def test_kl_and_agreement_are_those_of_the_definition() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.6, 0.2], [0.2, 0.1, 0.7]], dtype=torch.float64)
    found = distance(p.log(), q.log(), logits=True)
    assert found.kl_nats == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert found.argmax_agreement == 0.5


@pytest.mark.parametrize(
    ("mode", "streaming", "resolved"),
    [
        ("auto", True, "layers"),
        ("auto", False, "logits"),
        ("logits", True, "logits"),
        ("none", True, "none"),
    ],
)
def test_auto_streams_but_for_models_in_memory(mode: str, streaming: bool, resolved: str) -> None:
    assert resolve_mode(mode, streaming=streaming) == resolved


@pytest.mark.parametrize("mode", ["", "all", True, False, None])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(UpcyclingError, match="layers, logits, none"):
        resolve_mode(mode, streaming=True)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One token for each of the first characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {chr(32 + i): i for i in range(vocabulary - 1)} | {"?unknown?": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?unknown?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))


def test_the_proof_runs_on_text_where_there_is_a_tokenizer(source: Path, tmp_path: Path) -> None:
    write_tokenizer(source, 67)
    proof = convert(source, tmp_path / "out", verify="auto").proof
    assert proof.tokens == "64 tokens of a sample text"  # the model has 64 positions
    assert proof.holds


def test_the_tokens_are_at_most_128_of_a_sample_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 67)
    config = LlamaConfig(vocab_size=67, max_position_embeddings=4096)
    sample = take_sample(tmp_path / "tokenizer.json", config)
    ids = sample.inputs["input_ids"]
    assert ids.shape == (1, 128)
    assert len(ids.unique()) > 10
    assert sample.words == "128 tokens of a sample text"


def test_a_tokenizer_of_another_model_is_refused_before_writing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(source, 90)
    monkeypatch.setattr(
        "fusion_upcycle.conversion.output.write_shards", lambda *_: pytest.fail("written")
    )
    with pytest.raises(UpcyclingError, match=r"tokenizer\.json gives token id \d+, but.* 67 embed"):
        convert(source, source.parent / "out", verify="auto")


def test_a_tokenizer_that_gives_no_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UpcyclingError, match=r"tokenizer\.json gives no token for a plain text"):
        take_sample(tmp_path / "tokenizer.json", LlamaConfig(vocab_size=67))


def test_a_damaged_tokenizer_is_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text("{not json")
    with pytest.raises(UpcyclingError, match=r"tokenizer\.json"):
        convert(source, source.parent / "out", verify="auto")
    assert [path.name for path in source.parent.iterdir()] == ["dense"]
