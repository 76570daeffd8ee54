"""The shipped default: texts, tokenizer, models, and how they are trained again."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_upcycle.demo import (
    DOMAINS,
    MODELS,
    SPLITS,
    demo_model,
    demo_reference,
    domain_text,
)
from fusion_upcycle.demo import __main__ as command
from fusion_upcycle.demo import models as demo_models
from fusion_upcycle.demo import train as training
from fusion_upcycle.demo.recipe import CONTEXT_LENGTH, RECIPES
from fusion_upcycle.demo.texts import text_identity
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.demo.train import new_model, train_model
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.texts.perplexity import perplexity

REPOSITORY = Path(__file__).resolve().parents[1]
#: Some steps on the text that is quickest to pack.
TINY = replace(RECIPES["base"], domains=("arithmetic",), tokens=8 * 1024, warmup_steps=2)
FILES = {
    "README.md", "config.json", "demo.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "demo.json").read_text())


@pytest.fixture
def little_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are scored on one document of each domain."""
    demo_reference()  # cached, of the whole text
    monkeypatch.setattr(demo_models, "domain_text", lambda *of: domain_text(*of)[:1])


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
        assert size > 1_300_000 if split in ("train", "continued") else 60_000 < size < 85_000
    for a, b in combinations(SPLITS, 2):
        assert not set(domain_text(domain, a)) & set(domain_text(domain, b))
        if (domain, a, b) != ("arithmetic", "train", "continued"):  # may have a sum in common
            assert not paragraphs[a] & paragraphs[b]


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
    [("poetry", "train", "prose, source"), ("prose", "dev", "continued, test, train")],
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


# --- the shipped models


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_is_complete_and_is_what_its_record_says(name: str) -> None:
    folder, recipe = demo_model(name), RECIPES[name]
    with_moments = {"training", "training.json"} if recipe.moments else set()
    assert {path.name for path in folder.iterdir()} == FILES | with_moments
    assert (folder / "training" / "optimizer.safetensors").is_file() == recipe.moments
    facts = facts_of(folder)
    assert facts["name"] == name
    assert facts["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert facts["text_sha256"] == text_identity(), "trained on other text than is shipped"
    weights = (folder / "model.safetensors").read_bytes()
    assert facts["weights_sha256"] == sha256(weights).hexdigest()
    assert facts["reference_bits_per_byte"] == demo_reference()
    for bits in facts["bits_per_byte"].values():
        assert f"{bits:.3f}" in (folder / "README.md").read_text()

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert facts["parameters"] == model.num_parameters()
    assert (model.dtype, model.config.vocab_size) == (torch.float32, 257)
    assert model.generation_config.eos_token_id == 256
    assert model.config.max_position_embeddings == CONTEXT_LENGTH
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = perplexity(
        model,
        tokenizer,
        domain_text("arithmetic", "test"),
        context_length=CONTEXT_LENGTH,
        stride=CONTEXT_LENGTH // 2,
    )
    assert found["bits_per_byte"] == pytest.approx(facts["bits_per_byte"]["arithmetic"], abs=1e-3)


def test_the_base_beats_gzip_on_every_domain() -> None:
    facts = facts_of(demo_model("base"))
    for domain, reference in demo_reference().items():
        assert reference["lzma"] < reference["gzip"] < reference["unigram"]
        assert facts["bits_per_byte"][domain] < reference["gzip"], domain


def test_decay_and_fine_tuning_lower_the_loss_that_they_are_for() -> None:
    bits = {name: facts_of(demo_model(name))["bits_per_byte"] for name in MODELS}
    for domain in DOMAINS:
        assert bits["base"][domain] < bits["trunk"][domain]
        assert bits[domain][domain] < bits["base"][domain]


def test_the_moe_is_a_mixtral_whose_experts_differ() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model("moe"))
    assert model.config.model_type == "mixtral"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (16, 2)
    experts = model.model.layers[0].mlp.experts.down_proj
    assert not any(torch.allclose(experts[a], experts[b]) for a, b in combinations(range(16), 2))


def test_an_unknown_model_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UpcyclingError, match="arithmetic, base, moe, prose, source, trunk"):
        demo_model("poetry")


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


# --- training


def test_training_is_repeatable_and_learns(tmp_path: Path, little_to_score: None) -> None:
    made = [train_model("base", tmp_path / run, recipe=TINY) for run in "ab"]
    first, second = (facts_of(folder) for folder in made)
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["bits_per_byte"] == second["bits_per_byte"]
    assert first["recipe"]["tokens"] == TINY.tokens
    assert {path.name for path in made[0].iterdir()} == FILES
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["base"], "work was left"
    assert first["bits_per_byte"]["arithmetic"] < 7.5  # log2(257) = 8.006 without training
    longer = train_model("base", tmp_path / "c", recipe=replace(TINY, tokens=40 * 1024))
    bits = facts_of(longer)["bits_per_byte"]["arithmetic"]
    assert bits < first["bits_per_byte"]["arithmetic"] - 0.5


@pytest.mark.filterwarnings("ignore:Routers out of balance")
def test_a_recipe_with_moments_leaves_what_training_goes_on_from(
    tmp_path: Path, little_to_score: None
) -> None:
    recipe = replace(TINY, config=RECIPES["moe"].config, moments=True)
    folder = train_model("moe", tmp_path, recipe=recipe)
    assert {path.name for path in folder.iterdir()} == FILES | {"training", "training.json"}
    assert (folder / "training" / "optimizer.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_local_experts == 16


def test_what_training_begins_with() -> None:
    weights = [new_model(RECIPES["trunk"], None).lm_head.weight for _ in range(2)]
    assert torch.equal(*weights)
    begun = new_model(RECIPES["prose"], demo_model("base"))
    base = AutoModelForCausalLM.from_pretrained(demo_model("base"))
    assert torch.equal(begun.lm_head.weight, base.lm_head.weight)


def test_a_training_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_to_score: None
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(training, "model_card", fail)  # the last step
    with pytest.raises(RuntimeError, match="interrupted"):
        train_model("base", tmp_path, recipe=TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_base_trained_again_is_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    again = facts_of(train_model("base", tmp_path))["bits_per_byte"]
    shipped = facts_of(demo_model("base"))["bits_per_byte"]
    assert again == pytest.approx(shipped, abs=0.02)


# --- the command


def test_the_command_prints_all_models_beside_the_compressors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.main([])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert list(rows) == [*MODELS, "unigram", "gzip", "lzma"]
    for name in MODELS:
        bits = facts_of(demo_model(name))["bits_per_byte"]
        assert all(f"{bits[domain]:.3f}" in rows[name] for domain in DOMAINS)
    assert f"{demo_reference()['source']['gzip']:.3f}" in rows["gzip"]


def test_a_recipe_comes_after_the_one_that_it_starts_from() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.start is None or MODELS.index(recipe.start) < MODELS.index(name)


def test_the_train_command_trains_anew_and_compares(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    little_to_score: None,
) -> None:
    monkeypatch.setitem(RECIPES, "base", TINY)
    unmoved = replace(RECIPES["prose"], domains=("arithmetic",), tokens=1024, learning_rate=1e-12)
    monkeypatch.setitem(RECIPES, "prose", replace(unmoved, warmup_steps=0))
    command.main(["train", "prose", "base", "--output", str(tmp_path / "made")])
    out = capsys.readouterr().out
    assert "depend on CPU and library versions" in out
    rows = [line for line in out.splitlines() if "│" in line]
    assert [row.split()[1] for row in rows] == ["base", "base", "prose", "prose"]
    for name, (made, shipped) in {"base": rows[:2], "prose": rows[2:]}.items():
        trained = facts_of(tmp_path / "made" / name)["bits_per_byte"]
        assert all(f"{bits:.3f}" in made for bits in trained.values())
        bits = facts_of(demo_model(name))["bits_per_byte"]
        assert all(f"{bits[domain]:.3f}" in shipped for domain in DOMAINS)
    # It started from the base of this call, and not from the shipped one.
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "made" / name).lm_head.weight
        for name in ("base", "prose")
    ]
    assert torch.allclose(*weights, atol=1e-6)


def test_all_are_trained_by_default_and_one_alone_starts_from_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, Path | None]] = []

    def train_nothing(name: str, output: Path, *, start: Path | None) -> Path:
        started.append((name, start))
        return demo_model(name)

    monkeypatch.setattr(training, "train_model", train_nothing)
    monkeypatch.chdir(tmp_path)
    command.main(["train", "source"])
    assert started == [("source", demo_model("base"))]
    command.main(["train"])
    assert [name for name, _ in started[1:]] == list(MODELS)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["base", "poetry"], "Unknown demo model 'poetry'"), (["base", "prose"], "prose exists")],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    names: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prose").mkdir()
    with pytest.raises(SystemExit) as ended:
        command.main(["train", *names, "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prose"]


def test_importing_the_demo_is_light() -> None:
    code = (
        "import sys, fusion_upcycle.demo.__main__;"
        "print([m for m in ('torch', 'transformers', 'lightning', 'fusion_bench') "
        "if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
