"""LoRA adapters: the tensors that PEFT merges, computed lazily; all else is refused by name."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file
from tiny import dense_folder, edit_config, logits_of, tensors_of
from tiny_adapters import CONFIG, PREFIX, WEIGHTS, edit_adapter, live_base, lora, merged, paste
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fusion_upcycle.checkpoint import adapter as adapter_module
from fusion_upcycle.checkpoint.adapter import AdapterSource
from fusion_upcycle.checkpoint.located import locate_model
from fusion_upcycle.conversion.adapted import open_model, put_on
from fusion_upcycle.errors import UpcyclingError

BF16 = torch.bfloat16
UP = "model.layers.1.mlp.up_proj"


def opened(adapter: Path, base: Path | None = None) -> AdapterSource:
    _, source = open_model(locate_model(adapter, base))
    assert isinstance(source, AdapterSource)
    return source


def refused(adapter: Path, match: str, base: Path | None = None) -> UpcyclingError:
    with pytest.raises(UpcyclingError, match=match) as caught:
        opened(adapter, base)
    return caught.value


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of it, to be read only."""
    folder = tmp_path_factory.mktemp("shared")
    lora(dense_folder(folder / "base", "llama"), folder / "adapter", "up_proj", "q_proj")
    return folder


@pytest.fixture
def base(shared: Path) -> Path:
    """A tiny Llama in float32, to be read only."""
    return shared / "base"


@pytest.fixture
def adapter(shared: Path, tmp_path: Path) -> Path:
    """An adapter of `base` on up_proj and q_proj."""
    return Path(shutil.copytree(shared / "adapter", tmp_path / "adapter"))


# --- the tensors -------------------------------------------------------------------------------

FFN = ("up_proj", "down_proj")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "rslora": (FFN, {"use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        ("gate_proj", "down_proj", "k_proj"),
        {
            "alpha_pattern": {"layers.1.mlp.gate_proj": 5, ".*k_proj": 1},
            "rank_pattern": {"down_proj": 2, "layers.0.mlp.gate_proj": 3},
        },
    ),
    "dora": (("up_proj", "o_proj"), {"use_dora": True}),
    "embeddings, and whole modules": (
        ("embed_tokens", "up_proj"),
        {"modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "some layers": (FFN, {"layers_to_transform": [1]}),
    "all but some": (FFN, {"exclude_modules": ["layers.0.mlp.up_proj"]}),
    "a regular expression": ((), {"target_modules": r".*\.(up|q)_proj"}),
    "all linear": ((), {"target_modules": "all-linear"}),
    "half precision": (FFN, {"dtype": BF16}),
}


def same_as_peft(adapter: Path, base: Path, *, tolerance: float = 2e-6) -> AdapterSource:
    """Each tensor is that of PEFT's merge, up to PEFT's rounding; those that it names changed."""
    source = opened(adapter)
    expected, before = merged(base, adapter).state_dict(), live_base(base).state_dict()
    assert source.specs.keys() <= expected.keys()
    for name in source.specs:
        found, wanted = source.tensor(name), expected[name]
        assert found.dtype == before[name].dtype
        scale = max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted.double()).abs().max() <= tolerance * scale, name
        assert torch.equal(found, before[name]) == (name not in source.trained), name
    return source


@pytest.mark.parametrize(("targets", "options"), CASES.values(), ids=CASES)
def test_the_tensors_are_those_that_peft_merges(
    targets: tuple[str, ...], options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    same_as_peft(lora(base, tmp_path / "adapter", *targets, **options), base)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=9))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=67)
    )


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(num_hidden_layers=2, vocab_size=67, **sizes))


@pytest.mark.parametrize(
    ("make", "targets", "options"),
    [
        (gpt2, ("c_fc", "mlp.c_proj"), {}),
        (gpt2, ("c_fc", "c_attn"), {"use_dora": True}),  # matrices stand as [in, out]
        (gpt2, ("c_fc",), {"bias": "all"}),
        (gpt2, ("c_proj",), {"bias": "lora_only", "lora_bias": True}),
        (t5, ("wi", "wo", "q"), {}),
        (bert, ("intermediate.dense",), {"modules_to_save": ["transform.dense"]}),
    ],
)
def test_other_families_are_read_as_peft_merges_them(
    make: Callable[[], PreTrainedModel],
    targets: tuple[str, ...],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    make().save_pretrained(tmp_path / "base")
    same_as_peft(
        lora(tmp_path / "base", tmp_path / "adapter", *targets, **options), tmp_path / "base"
    )


def test_a_base_without_the_prefix_of_its_class_is_read_as_transformers_reads_it(
    tmp_path: Path,
) -> None:
    """As the Hub has GPT-2: the files are of the backbone, PEFT's names of the whole model."""
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    model.transformer.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", architectures=["GPT2LMHeadModel"])
    assert "h.0.mlp.c_fc.weight" in tensors_of(tmp_path / "base")
    same_as_peft(lora(tmp_path / "base", tmp_path / "adapter", "c_fc"), tmp_path / "base")


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once_to_the_bases_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against W + B A alpha/r by hand, in float64."""
    base = dense_folder(tmp_path / "base", "llama", dtype=dtype)
    adapter = lora(base, tmp_path / "adapter", "up_proj", lora_alpha=10, dtype=torch.float32)
    before, file = tensors_of(base), load_file(adapter / WEIGHTS)
    a, b = (file[f"{PREFIX}{UP}.lora_{x}.weight"].double() for x in "AB")
    expected = (before[f"{UP}.weight"].double() + 2.5 * (b @ a)).to(dtype)
    assert torch.equal(opened(adapter).tensor(f"{UP}.weight"), expected)
    assert not torch.equal(before[f"{UP}.weight"], expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_any_piece_has_the_bits_of_the_whole(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    adapter = lora(tmp_path / "base", tmp_path / "adapter", "c_fc", **options)
    name = "transformer.h.1.mlp.c_fc.weight"
    monkeypatch.setattr(adapter_module, "CHUNK_ELEMENTS", 300)  # a row has 128
    source = opened(adapter)
    whole = source.tensor(name).flatten()
    for start, stop in [(0, None), (0, 1), (255, 257), (290, 1500), (4000, 9999), (7, 7)]:
        pieces = list(source.chunks(name, start, stop))
        assert [piece.numel() for piece in pieces[:-1]] == [300] * (len(pieces) - 1)
        assert torch.equal(torch.cat(pieces), whole[start:stop])


# --- what is tied ------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tiny Llama with tied embeddings."""
    return dense_folder(tmp_path / "tied", "llama", tie_word_embeddings=True)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_tied_embeddings_that_were_trained_as_one_are_merged_as_one(
    options: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    adapter = lora(tied, tmp_path / "adapter", ensure_weight_tying=True, **options)
    assert f"{PREFIX}lm_head" in " ".join(load_file(adapter / WEIGHTS))
    source, live = opened(adapter), live_base(tied)
    assert "lm_head.weight" not in source.specs
    before = logits_of(live)
    put_on(live, source)
    # PEFT's merge adds a tied pair twice; what it trained is what it computes before that.
    expected = logits_of(PeftModel.from_pretrained(live_base(tied), adapter))
    assert (logits_of(live) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up_proj", "embed_tokens"]},
        {"target_modules": ["up_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_tied_embeddings_that_were_trained_apart_are_refused_until_they_are_untied(
    options: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    adapter = lora(tied, tmp_path / "adapter", **options)
    paste(refused(adapter, r"lm_head\.weight.*one tensor in the base.*-untied"))
    untied = tied.with_name("tied-untied")
    live = live_base(untied)
    put_on(live, opened(adapter, untied))
    expected = logits_of(PeftModel.from_pretrained(live_base(tied), adapter))
    assert (logits_of(live) - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- what is refused ---------------------------------------------------------------------------

A, B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "A without B": (lambda t: t.pop(B), r"has no lora_B\.weight beside it.*Download it again"),
    "B without A": (lambda t: t.pop(A), r"has no lora_A\.weight beside it"),
    "no pair of a target": (
        lambda t: (t.pop(A), t.pop(B)),
        rf"lacks lora_A and lora_B of {UP}.*target_modules",
    ),
    "a module that the base has not": (
        lambda t: t.update({A.replace("1.mlp", "7.mlp"): t[A], B.replace("1.mlp", "7.mlp"): t[B]}),
        r"layers\.7\.mlp\.up_proj, which the base does not have.*base=\"FOLDER\"",
    ),
    "another width": (lambda t: t.update({A: torch.ones(4, 48)}), r"calls for \[4, 32\].*another"),
    "another rank": (
        lambda t: t.update({A: torch.ones(3, 32), B: torch.ones(48, 3)}),
        r"shape \[3, 32\].*says rank 4 for model\.layers\.1\.mlp\.up_proj.*rank_pattern",
    ),
    "a vector": (lambda t: t.update({A: torch.ones(32)}), r"lora_A.*shape \[32\]"),
    "not finite": (lambda t: t[B].fill_(torch.nan), r"lora_B\.weight has values that are not"),
    "no prefix": (lambda t: t.update({UP: t.pop(A)}), "does not begin with base_model"),
    "the adapter's name in it": (
        lambda t: t.update({A.replace("A.weight", "A.default.weight"): t.pop(A)}),
        r"has no lora_A\.weight|no place in the base",
    ),
    "a whole tensor of no place": (
        lambda t: t.update({f"{PREFIX}{UP}.bias": torch.ones(48)}),
        r"up_proj\.bias has no place in the base.*merge_and_unload",
    ),
    "more rows than the vocabulary": (
        lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(69, 32)}),
        r"lm_head\.weight has shape \[69, 32\].*added tokens",
    ),
    "a magnitude, and no DoRA": (
        lambda t: t.update({f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(48)}),
        r"lora_magnitude_vector does not fit: use_dora=false.*has a lora_magnitude",
    ),
    "another kind of part": (
        lambda t: t.update({f"{PREFIX}{UP}.lora_diag": torch.ones(4)}),
        r"lora_diag has no place in the base, and is no part of a LoRA",
    ),
    "a pair on a norm": (
        lambda t: t.update({n.replace(UP, "model.norm"): t[n] for n in (A, B)}),
        r"of model\.norm, a LlamaRMSNorm and no matrix",
    ),
}


@pytest.mark.parametrize(("edit", "match"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_without_a_place_are_refused_by_name(
    edit: Callable[[dict[str, Tensor]], object], match: str, adapter: Path
) -> None:
    edit_adapter(adapter, edit)
    refused(adapter, match)


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora without magnitudes": ({"use_dora": True}, "use_dora=true.*no lora_magnitude_vector"),
    "a way to begin": ({"init_lora_weights": "pissa_niter_16"}, "base's weights were changed"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "a field of the future": ({"lora_twist": 0.5}, "lora_twist=0.5.*not known.*merge_and_unload"),
    "no rank": ({"r": 0}, "r=0 is not the rank"),
    "a rank of text": ({"r": "4"}, "r=4 is not the rank"),
    "alpha of text": ({"lora_alpha": "big"}, "lora_alpha=big is not a number"),
    "alpha not finite": ({"lora_alpha": float("inf")}, "lora_alpha=inf is not a number"),
    "a flag of text": ({"use_rslora": "yes"}, "use_rslora=yes must be true or false"),
    "patterns in a list": ({"rank_pattern": ["up_proj"]}, "rank_pattern.*must be an object"),
    "a pattern without end": ({"alpha_pattern": {"(.*)*x": 2}}, "may take for ever"),
    "no regular expression": ({"alpha_pattern": {"(": 2}}, "no regular expression"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules=.*names of modules"),
    "layers of text": ({"layers_to_transform": "1"}, "layers_to_transform=1 must be whole"),
    "no base": (
        {"base_model_name_or_path": None},
        "does not name the model.*: base=",
    ),
    "a base of numbers": ({"base_model_name_or_path": 7}, "base_model_name_or_path=7"),
    "a base that is gone": (
        {"base_model_name_or_path": "./gone"},
        "not to be had.*: base=",
    ),
}


@pytest.mark.parametrize(("fields", "match"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_config_that_is_not_of_plain_lora_is_refused_by_name(
    fields: dict[str, Any], match: str, adapter: Path
) -> None:
    edit_adapter(adapter, **fields)
    refused(adapter, match)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
        LoHaConfig(r=2, target_modules=["up_proj"]),
    ],
    ids=["IA3", "LOHA"],
)
def test_another_kind_is_refused_with_a_line_that_merges_it(
    config: Any, base: Path, tmp_path: Path
) -> None:
    adapter = lora(base, tmp_path / "other", config=config)
    paste(refused(adapter, f"peft_type='{config.peft_type.value}' is not LORA.*other-merged"))
    found = tensors_of(tmp_path / "other-merged")[f"{UP}.weight"]
    assert torch.equal(found, merged(base, adapter).state_dict()[f"{UP}.weight"])
    assert not torch.equal(found, tensors_of(base)[f"{UP}.weight"])


def test_a_kind_without_weights_is_refused(base: Path, tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(lora(base, tmp_path / "prefix", config=config), "PREFIX_TUNING changes no weight")


def test_pickled_weights_are_refused_with_a_line_that_converts_them(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    paste(refused(adapter, r"adapter_model\.bin is pickled"))
    assert load_file(adapter / WEIGHTS).keys() == tensors.keys()
    opened(adapter)


def test_no_weights_are_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refused(adapter, "without weights")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_link_that_leads_out_of_the_folder_is_refused(
    file: str, adapter: Path, tmp_path: Path
) -> None:
    (adapter / file).rename(tmp_path / "elsewhere")
    (adapter / file).symlink_to(tmp_path / "elsewhere")
    refused(adapter, f"{file} is a link to .*outside")


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, shared: Path) -> None:
    refused(adapter, "is an adapter itself. Merge it first", base=shared / "adapter")


def test_an_adapter_of_an_moe_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=67, num_attention_heads=4, **sizes))
    model.save_pretrained(tmp_path / "moe")
    refused(lora(tmp_path / "moe", tmp_path / "adapter", "q_proj"), "'mixtral' model, an MoE")


def test_values_beyond_the_bases_dtype_are_refused(tmp_path: Path) -> None:
    base = dense_folder(tmp_path / "base", "llama", dtype=torch.float16)
    adapter = lora(base, tmp_path / "adapter", "up_proj", dtype=torch.float32)
    edit_adapter(adapter, lambda t: (t[A].fill_(1e4), t[B].fill_(1e4)))
    source = opened(adapter)
    with pytest.raises(UpcyclingError, match=r"up_proj\.weight.*float16.*cannot hold"):
        source.tensor(f"{UP}.weight")


def test_another_base_than_the_adapter_names_is_said(
    adapter: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_adapter(adapter, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    with caplog.at_level(logging.WARNING):
        opened(adapter, base)
    assert "trained on meta-llama/Llama-3.2-1B; it is put on" in caplog.text


def test_a_base_on_the_hub_is_fetched_in_the_revision_that_the_adapter_names(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    edit_adapter(adapter, base_model_name_or_path="someone/llama", revision="v2")
    for named in (None, "someone/llama", "someone/else"):
        assert locate_model(adapter, named).folder == base
    assert asked == [("someone/llama", "v2"), ("someone/llama", "v2"), ("someone/else", None)]


@pytest.mark.parametrize(
    ("own", "match"),
    [({"a": 1, "b": 0}, "gives the token 'a' the id 1"), ({"a": 0, "b": 1, "<pad>": 2}, None)],
)
def test_the_adapters_tokenizer_must_be_the_bases(
    own: dict[str, int], match: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = dense_folder(tmp_path / "base", "llama")
    adapter = lora(base, tmp_path / "adapter", "up_proj")
    for folder, ids in ((base, {"a": 0, "b": 1}), (adapter, own)):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    if match is not None:
        refused(adapter, match)
        return
    opened(adapter)
    assert "tokens that its base's has not (<pad>)" in caplog.text


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    "alpha_pattern base_model_name_or_path bias exclude_modules init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_bias peft_type r rank_pattern revision target_modules "
    "use_dora use_rslora"
)


fuzz = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(
    name=st.sampled_from([A, B, f"{PREFIX}lm_head.weight", f"{PREFIX}model.norm.weight", PREFIX]),
    ending=st.sampled_from(["", ".weight", ".base_layer.weight", ".lora_embedding_A", "."]),
    shape=st.lists(st.sampled_from([0, 1, 4, 32, 48, 67]), max_size=3),
)
def test_any_tensor_is_read_or_refused(
    name: str, ending: str, shape: list[int], adapter: Path, shared: Path
) -> None:
    shutil.copy(shared / "adapter" / WEIGHTS, adapter / WEIGHTS)
    edit_adapter(adapter, lambda t: t.update({name + ending: torch.ones(shape)}))
    try:
        source = opened(adapter)
        for own in source.trained:
            assert source.tensor(own).isfinite().all()
    except UpcyclingError as error:
        assert len(str(error)) > 20


@fuzz
@given(field=st.sampled_from(FIELDS.split()), value=anything)
def test_any_field_is_read_or_refused(
    field: str, value: Any, adapter: Path, base: Path, shared: Path
) -> None:
    shutil.copy(shared / "adapter" / CONFIG, adapter / CONFIG)
    edit_adapter(adapter, **{field: value})
    try:
        opened(adapter, base)
    except UpcyclingError as error:
        assert len(str(error)) > 20
