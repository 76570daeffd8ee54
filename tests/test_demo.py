"""The embedded default: texts, tokenizer, training, cache. The last tests need the real base."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from processes import ended, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle.demo import (
    DOMAINS,
    MODELS,
    SPLITS,
    demo_model,
    demo_moe,
    demo_reference,
    domain_text,
)
from fusion_upcycle.demo import __main__ as demo_command
from fusion_upcycle.demo import models as demo_models
from fusion_upcycle.demo import moe as demo_moe_module
from fusion_upcycle.demo.recipe import MoERecipe, Recipe
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = Recipe(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    context_length=256,  # few windows to evaluate
    batch_size=2,
    base_steps=12,
    finetune_steps=6,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_UPCYCLE_CACHE", str(folder))
        yield folder


# --- texts


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_document_and_no_paragraph(domain: str) -> None:
    separator, shortest = ("\n", 1) if domain == "arithmetic" else ("\n\n", 80)
    paragraphs = {}
    for split in SPLITS:
        documents = domain_text(domain, split)
        words = (" ".join(p.split()) for document in documents for p in document.split(separator))
        paragraphs[split] = {text for text in words if len(text) >= shortest}
        assert len(paragraphs[split]) > 100
        size = sum(len(document.encode()) for document in documents)
        assert size > 250_000 if split == "train" else 30_000 < size < 45_000
    for a, b in combinations(SPLITS, 2):
        assert not set(domain_text(domain, a)) & set(domain_text(domain, b))
        assert not paragraphs[a] & paragraphs[b]


def test_texts_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from fusion_upcycle.demo.texts import text_identity; print(text_identity())"
    identities = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(identities) == 1


def test_the_worked_arithmetic_is_right() -> None:
    lines = [
        line for document in domain_text("arithmetic", "test") for line in document.split("\n")
    ]
    checked = 0
    for line in filter(None, lines):
        for equation in line.partition(": ")[2].replace(";", ",").split(", "):
            left, _, right = equation.partition(" = ")
            assert eval(left) == int(right), line
            checked += 1
    assert checked > 1000


@pytest.mark.parametrize(
    ("domain", "split", "known"),
    [("poetry", "train", "prose, source"), ("prose", "dev", "train, validation")],
)
def test_unknown_text_is_an_error_that_lists_the_known(domain: str, split: str, known: str) -> None:
    with pytest.raises(UpcyclingError, match=known):
        domain_text(domain, split)


# --- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and  double",
        "tab\t\r\n",
        "Grüße 🙂 \u0000 ﬁ e\u0301",
        "don't , stop .",
        "▁Ġ<s>",
    ],
)
def test_tokenizer_gives_one_token_per_byte_and_the_text_back(text: str, tmp_path: Path) -> None:
    byte_tokenizer(64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids, default=0) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    assert (len(tokenizer), tokenizer.model_max_length) == (257, 64)


# --- models


@pytest.mark.early
def test_a_fine_tune_trains_the_base_first_and_both_folders_are_complete(
    cache: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    prose = demo_model("prose", TINY)
    assert torch.equal(torch.get_rng_state(), state)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("demo:")]
    assert [line.split()[2] for line in lines] == ["'base'", "'prose'"]
    assert str(prose) in lines[1] and prose.is_relative_to(cache)
    assert not list(tmp_path.iterdir()), "training left files in the working folder"

    base = demo_model("base", TINY)
    assert not capfd.readouterr().out, "the base was not cached"
    assert {path.name for path in base.parent.iterdir()} == {
        ".base.lock",
        ".prose.lock",
        "base",
        "prose",
    }
    for folder in (base, prose):
        assert {path.name for path in folder.iterdir()} == {
            "README.md", "config.json", "demo.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert (model.generation_config.eos_token_id, model.config.vocab_size) == (256, 257)
        facts = json.loads((folder / "demo.json").read_text())
        assert facts["bits_per_byte"].keys() == set(DOMAINS)
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        assert f"{facts['bits_per_byte']['prose']:.3f}" in (folder / "README.md").read_text()
    weights = [AutoModelForCausalLM.from_pretrained(f).lm_head.weight for f in (base, prose)]
    assert not torch.equal(*weights), "the fine-tune is the base"


def test_the_command_trains_all_and_prints_them_beside_the_compressors(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_command, "demo_model", partial(demo_model, recipe=TINY))
    demo_command.main()
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert list(rows) == [*MODELS, "unigram", "gzip", "lzma"]
    for name in MODELS:
        facts = json.loads((demo_model(name, TINY) / "demo.json").read_text())
        assert all(f"{facts['bits_per_byte'][domain]:.3f}" in rows[name] for domain in DOMAINS)
    assert f"{demo_reference()['source']['gzip']:.3f}" in rows["gzip"]


def test_training_is_repeatable_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = []
    for run in ("a", "b"):
        monkeypatch.setenv("FUSION_UPCYCLE_CACHE", str(tmp_path / run))
        facts = json.loads((demo_model("base", TINY) / "demo.json").read_text())
        bits.append(facts["bits_per_byte"])
    assert bits[0] == bits[1]
    assert max(bits[0].values()) < 7.5  # log2(257) = 8.006 without training
    longer = replace(TINY, base_steps=60)
    facts = json.loads((demo_model("base", longer) / "demo.json").read_text())
    assert facts["bits_per_byte"]["prose"] < bits[0]["prose"] - 0.3


@pytest.mark.filterwarnings("ignore:Routers out of balance")
def test_the_moe_is_the_base_upcycled_trained_and_cached(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = MoERecipe(tokens=2048, batch_size=2)
    made = demo_moe(recipe, TINY)
    assert " an MoE " in capfd.readouterr().out
    assert demo_moe(recipe, TINY) == made
    assert " an MoE " not in capfd.readouterr().out, "the MoE was not cached"
    folders = {path.name for path in made.parent.iterdir() if path.is_dir()}
    assert folders <= {*MODELS, made.name}, "work of the training was left"
    assert (made / "training" / "optimizer.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(made)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    experts = model.model.layers[0].mlp.experts.down_proj
    assert not any(torch.equal(experts[a], experts[b]) for a, b in combinations(range(4), 2))
    facts = json.loads((made / "demo.json").read_text())
    assert facts["parameters"] == model.num_parameters()
    assert facts["bits_per_byte"].keys() == set(DOMAINS)


def test_the_key_of_the_moe_follows_its_recipe() -> None:
    assert demo_moe_module._digest(MoERecipe()) == demo_moe_module._digest(replace(MoERecipe()))
    assert demo_moe_module._digest(MoERecipe()) != demo_moe_module._digest(MoERecipe(seed=1))


def tell_where_the_base_is() -> None:
    """In a process of its own."""
    print("at", demo_model("base", TINY))


@pytest.mark.early
def test_two_processes_at_once_train_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [tmp_path / f"log{number}" for number in range(2)]
    processes = [
        start(tell_where_the_base_is, log=log, FUSION_UPCYCLE_CACHE=str(tmp_path / "cache"))
        for log in logs
    ]
    assert [ended(*pair) for pair in zip(processes, logs, strict=True)] == [0, 0]
    lines = capsys.readouterr().out.splitlines()
    assert len({line for line in lines if line.startswith("at ")}) == 1
    assert len([line for line in lines if line.startswith("at ")]) == 2
    assert len([line for line in lines if line.startswith("demo: training")]) == 1


def test_a_training_that_fails_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_UPCYCLE_CACHE", str(tmp_path))

    def fail(*_: object) -> str:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(demo_models, "_model_card", fail)  # the last step
    with pytest.raises(RuntimeError, match="interrupted"):
        demo_model("base", TINY)
    assert [path.name for path in tmp_path.glob("demo/*/*")] in ([], [".base.lock"])


def test_the_key_of_the_cache_follows_the_recipe() -> None:
    assert demo_models._key(TINY) == demo_models._key(replace(TINY))
    assert demo_models._key(TINY) != demo_models._key(replace(TINY, seed=1))


def test_an_unknown_model_is_an_error_that_lists_the_known(cache: Path) -> None:
    with pytest.raises(UpcyclingError, match="arithmetic, base, prose, source"):
        demo_model("poetry")


def test_importing_the_demo_is_light() -> None:
    code = (
        "import sys, fusion_upcycle.demo;"
        "print([m for m in ('torch', 'transformers', 'lightning', 'fusion_bench') "
        "if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- the shipped base


def test_the_base_beats_the_compressors_on_every_domain(demo_base: Path) -> None:
    facts = json.loads((demo_base / "demo.json").read_text())
    assert MODELS[0] == facts["name"]
    for domain, reference in demo_reference().items():
        assert reference["lzma"] < reference["gzip"] < reference["unigram"]
        assert facts["bits_per_byte"][domain] < reference["gzip"], domain
    assert 0.5e6 < facts["parameters"] < 2e6


def test_the_base_writes_words_and_not_a_loop(demo_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    model = AutoModelForCausalLM.from_pretrained(demo_base)
    prompt = tokenizer("The following sections describe ", return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(
        input_ids=prompt["input_ids"], max_new_tokens=200, do_sample=True, temperature=0.7, top_k=40
    )
    written = tokenizer.decode(ids[0], skip_special_tokens=True)
    words = written.split()
    known = set(" ".join(domain_text("prose", "train") + domain_text("source", "train")).split())
    assert len(set(words)) > 0.4 * len(words), written
    assert sum(word in known for word in words) > 0.4 * len(words), written
