"""Model pool and task pool of sequence-to-sequence models: the numbers, the tasks, the refusals."""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from fusion_bench.modelpool import Seq2SeqLMPool as TheirPool
from fusion_bench.tasks.flan_t5_text_generation.glue_prompt_templates import glue_prompt_templates
from fusion_bench.utils import instantiate
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_plugin import compose
from test_taskpool import run
from test_vision_pools import METHODS, merged
from tiny_vision import NAMES, save, t5, text_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.modelpool import Seq2SeqLMPool
from fusion_upcycle.tables import pairs as tables
from fusion_upcycle.taskpool import Seq2SeqTaskPool
from fusion_upcycle.texts.bootstrap import block_bootstrap, spread

END = 256
EXAMPLES = [
    *(("is it a cat", "yes"), ("is it a dog?", "no"), ("a cat: yes or no?", "yes")),
    *(("dog or not", "no"), ("nothing", "no"), ("what", "yes"), ("who is there", "maybe")),
]
LEARNT = 5
LABELS = ["yes", "no", "maybe"]


def load_pairs(name: str, given: Any) -> tables.Pairs:
    return tables.load_pairs(given, f"taskpool.tasks.{name}", splits=["test"])


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {name: t5(seed) for seed, name in enumerate(NAMES)}
    return save(models, text_tokenizer(), tmp_path_factory.mktemp("t5"))


def ids(text: str) -> list[int]:
    return [*text_tokenizer()(text)["input_ids"], END]


def encoded(text: str) -> torch.Tensor:
    return torch.tensor([text_tokenizer()(text)["input_ids"]])


@pytest.fixture(scope="module")
def trained() -> T5ForConditionalGeneration:
    """Knows the first five answers."""
    torch.manual_seed(0)
    model = t5(0, dropout_rate=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts, targets = zip(*EXAMPLES[:LEARNT], strict=True)
    inputs = text_tokenizer()(list(texts), return_tensors="pt", padding=True)
    tensors = [torch.tensor(ids(target)) for target in targets]
    labels = pad_sequence(tensors, batch_first=True, padding_value=-100)
    for _ in range(50):
        masked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        model(**masked, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def file_of(tmp_path: Path, examples: Any = EXAMPLES) -> str:
    return write(tmp_path / "x.jsonl", [{"input": i, "target": t} for i, t in examples])


def pool(tasks: Any, folders: dict[str, Path], **options: Any) -> Seq2SeqTaskPool:
    return Seq2SeqTaskPool(tasks, tokenizer=str(folders["a"]), **options)


def nats(model: T5ForConditionalGeneration, text: str, target: str) -> float:
    """By the model's own loss, alone and without padding."""
    labels = torch.tensor([ids(target)])
    with torch.no_grad():
        return model(input_ids=encoded(text), labels=labels).loss.item() * labels.numel()


def greedy(model: T5ForConditionalGeneration, text: str, tokens: int) -> str:
    """Token by token, without a cache."""
    answer = [END]  # which begins, too
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=encoded(text), decoder_input_ids=torch.tensor([answer])).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == END:
            break
    return str(text_tokenizer().decode(answer, skip_special_tokens=True)).strip()


def share(right: list[bool]) -> tuple[float, float]:
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1))


def test_scores_are_those_of_a_hand_computation(
    trained: T5ForConditionalGeneration, folders: dict[str, Path], tmp_path: Path
) -> None:
    task = {"path": file_of(tmp_path), "labels": LABELS}
    report = pool({"x": task}, folders, batch_size=3).evaluate(trained.train())
    assert all(module.training for module in trained.modules())
    trained.eval()
    longest = max(len(ids(target)) for _, target in EXAMPLES)
    same = [greedy(trained, text, longest) == target for text, target in EXAMPLES]
    chosen = [min(LABELS, key=lambda word: nats(trained, text, word)) for text, _ in EXAMPLES]
    right = [word == target for word, (_, target) in zip(chosen, EXAMPLES, strict=True)]
    each = [nats(trained, *example) for example in EXAMPLES]
    tokens = [len(ids(target)) for _, target in EXAMPLES]
    assert all(same[:LEARNT]) and not all(same) and not all(right)
    means = block_bootstrap(each, tokens)
    assert means is not None
    assert report["x"] == pytest.approx(
        {
            "accuracy": share(right)[0],
            "accuracy_stderr": share(right)[1],
            "exact_match": share(same)[0],
            "exact_match_stderr": share(same)[1],
            "loss_nats_per_token": sum(each) / sum(tokens),
            "loss_nats_per_token_stderr": spread(means).stderr,
            "examples": len(EXAMPLES),
            "truncated_inputs": 0,
        },
        rel=1e-4,
    )
    assert report["model_info"]["all_params"] == trained.num_parameters()
    json.dumps(report, allow_nan=False)


def test_an_answer_that_goes_on_is_another_one(
    trained: T5ForConditionalGeneration, folders: dict[str, Path], tmp_path: Path
) -> None:
    examples = [(EXAMPLES[0][0], "ye"), (EXAMPLES[0][0], " yes ")]
    report = pool({"x": file_of(tmp_path, examples)}, folders).evaluate(trained)
    assert report["x"]["exact_match"] == 0.5  # white space around does not count
    assert "accuracy" not in report["x"]


def test_the_average_is_over_what_all_tasks_have(
    trained: T5ForConditionalGeneration, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of(tmp_path)
    half = write(tmp_path / "y.jsonl", [{"input": i, "target": t} for i, t in EXAMPLES[:3]])
    both = {"x": {"path": file, "labels": LABELS}, "y": half}
    report = pool(both, folders).evaluate(trained)
    names = ("exact_match", "loss_nats_per_token")
    assert set(report["average"]) == {*names, *(f"{name}_stderr" for name in names)}
    for name in names:
        expected = (report["x"][name] + report["y"][name]) / 2
        assert report["average"][name] == pytest.approx(expected)
    error = math.hypot(*(report[task]["loss_nats_per_token_stderr"] for task in "xy")) / 2
    assert report["average"]["loss_nats_per_token_stderr"] == pytest.approx(error)


def test_inputs_that_are_cut_are_counted_and_scored_as_cut(
    trained: T5ForConditionalGeneration, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of(tmp_path)
    report = pool({"x": file}, folders, max_input_tokens=7).evaluate(trained)["x"]
    assert report["truncated_inputs"] == sum(len(text) > 7 for text, _ in EXAMPLES) == 5
    each = [nats(trained, text[:7], target) for text, target in EXAMPLES]
    tokens = sum(len(ids(target)) for _, target in EXAMPLES)
    assert report["loss_nats_per_token"] == pytest.approx(sum(each) / tokens, rel=1e-4)
    whole = pool({"x": file}, folders, max_input_tokens=None).evaluate(trained)["x"]
    assert whole == pool({"x": file}, folders).evaluate(trained)["x"]


# --- tasks ----------------------------------------------------------------------------------------

ROW = {
    "label": 1,
    "premise": "P",
    "hypothesis": "H",
    "question": "Q",
    "passage": "{braces}",
    "number": 2.25,
}


@pytest.mark.parametrize(
    ("said", "inputs", "target", "labels"),
    [
        ({"input": "{premise}: {passage}", "target": "{number:.1f}"}, "P: {braces}", "2.2", []),
        ({"input": "{question}", "target": {0: "no", 1: "yes"}}, "Q", "yes", ["no", "yes"]),
        ({"input": "x", "target": "{premise}", "labels": ["P", "H"]}, "x", "P", ["P", "H"]),
    ],
)
def test_columns_are_filled_in(
    said: dict[str, Any], inputs: str, target: str, labels: list[str], tmp_path: Path
) -> None:
    datasets.Dataset.from_list([ROW]).to_parquet(tmp_path / "x.parquet")
    pairs = load_pairs("x", {"path": str(tmp_path / "x.parquet"), **said})
    assert (list(pairs.inputs), list(pairs.targets)) == ([inputs], [target])
    assert list(pairs.labels) == labels


def tasks_of(name: str) -> dict[str, Any]:
    cfg = compose(f"taskpool=Seq2SeqTaskPool/{name}", "modelpool=Seq2SeqLMPool/_template")
    made = instantiate(cfg.taskpool)
    assert isinstance(made, Seq2SeqTaskPool) and made.max_input_tokens == 512
    return made.tasks


def test_tasks_of_glue_are_asked_as_fusion_bench_asks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = "sentence sentence1 sentence2 premise hypothesis question question1 question2"
    row = {name: name.upper() for name in columns.split()} | {"label": 1}
    asked = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options["name"], options["split"]))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = tasks_of("glue")
    assert set(tasks) == set(glue_prompt_templates) - {"stsb"}
    for name, task in tasks.items():
        pairs, theirs = load_pairs(name, task), glue_prompt_templates[name]
        assert list(pairs.inputs) == [theirs["input_text"].format(**row)]
        assert list(pairs.targets) == [theirs["target_text"]["1"]]
        assert list(pairs.labels) == list(theirs["target_text"].values())
    split = {"mnli": "validation_matched"}
    assert asked == [("nyu-mll/glue", name, split.get(name, "validation")) for name in tasks]


def test_tasks_of_super_glue_are_those_of_lm_eval() -> None:
    pytest.importorskip("lm_eval")
    for name, task in tasks_of("super_glue").items():
        file = files("lm_eval") / "tasks" / "super_glue" / name / "t5-prompt.yaml"
        text = file.read_text(encoding="utf-8").replace("!function", "")
        theirs = yaml.safe_load(text)
        assert task["path"] == theirs["dataset_path"] and task["name"] == theirs["dataset_name"]
        assert task["split"] == theirs["validation_split"]
        assert task["input"].replace("{", "{{").replace("}", "}}") == theirs["doc_to_text"]
        choices = theirs["doc_to_choice"]
        if isinstance(choices, str):  # MultiRC's, with the question's number before each
            choices = ["False", "True"]
        assert task["target"] == dict(enumerate(choices))


REFUSED: list[tuple[list[dict[str, Any]], Mapping[str, Any], str]] = [
    ([{"text": "a"}], {}, r"tasks\.x\.input='\{input\}' cannot be filled in .*columns are text"),
    ([{"input": "a"}], {}, r"tasks\.x\.target='\{target\}' cannot be filled in"),
    ([{"input": "a", "target": "b"}], {"input": "{0}"}, r"input='\{0\}' cannot be filled in"),
    ([{"input": "a", "target": "b"}], {"input": "{x"}, r"input='\{x' cannot be filled in"),
    ([{"input": None, "target": "b"}, {"input": "a", "target": "b"}], {}, "a column is empty"),
    ([{"input": "a", "label": -1}], {"target": {0: "n", 1: "y"}}, "no word for the label -1"),
    ([{"input": "a", "target": "b"}], {"labels": ["c", "d"]}, "target of example 0 is 'b'"),
    ([{"input": "a", "target": "b"}], {"labels": ["b", "b"]}, "two words or more, each once"),
    ([{"input": "a", "target": "b"}], {"labels": ["b"]}, "two words or more"),
    ([{"input": "a", "target": "b"}], {"labels": "b"}, "labels='b' must be words"),
    ([{"input": "a", "target": "b"}], {"labels": [True, "b"]}, "must be words: in quotes, as YAML"),
    ([{"input": "a", "label": 0}], {"target": {0: False, 1: True}}, "target=.* must be words"),
    ([{"input": "a", "target": "b"}], {"labels": []}, "two words or more"),
    ([{"input": "a", "target": "b"}], {"label": ["b"]}, "Did you mean 'labels'"),
]


@pytest.mark.parametrize(("rows", "said", "message"), REFUSED)
def test_examples_that_cannot_be_used_are_refused(
    rows: list[dict[str, Any]], said: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        load_pairs("x", {"path": write(tmp_path / "x.jsonl", rows), **said})


def test_lines_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{no\n")
    with pytest.raises(UpcyclingError, match=r"tasks\.x: .*x\.jsonl', line 1: no JSON"):
        load_pairs("x", str(tmp_path / "x.jsonl"))


def test_a_target_with_an_unknown_piece_is_refused(
    trained: T5ForConditionalGeneration, folders: dict[str, Path], tmp_path: Path
) -> None:
    knows_less = text_tokenizer()
    knows_less.unk_token = "y"
    knows_less.save_pretrained(tmp_path / "tokenizer")
    poorer = Seq2SeqTaskPool({"x": file_of(tmp_path)}, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(UpcyclingError, match=r"tasks\.x: the tokenizer cannot write .* 'yes'"):
        poorer.evaluate(trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokeniser": "x"}, "Did you mean 'tokenizer'"),
        ({"tasks": {}}, r"taskpool\.tasks is empty"),
        ({"tasks": {"model_info": "x"}}, "model_info is a name of the report"),
        ({"batch_size": 0}, r"taskpool\.batch_size=0"),
        ({"max_input_tokens": 0}, r"taskpool\.max_input_tokens=0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        Seq2SeqTaskPool(**{"tasks": {"x": "x.jsonl"}, **options})


def test_decoders_and_pools_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    tasks = {"x": file_of(tmp_path)}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UpcyclingError, match="A LlamaForCausalLM is no sequence-to-sequence"):
        Seq2SeqTaskPool(tasks).evaluate(llama)
    with pytest.raises(UpcyclingError, match=r"set taskpool\.tokenizer"):
        Seq2SeqTaskPool(tasks).evaluate(t5(0))
    with pytest.raises(UpcyclingError, match=r"modelpool\.tokenizer is not set"):
        Seq2SeqLMPool({}, tokenizer=None).load_tokenizer()


# --- model pool -----------------------------------------------------------------------------------


def test_the_pool_takes_plain_folders_and_configs_and_saves_whole_folders(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    target = "transformers.AutoModelForSeq2SeqLM.from_pretrained"
    entry = {"_target_": target, "pretrained_model_name_or_path": str(folders["a"])}
    made = Seq2SeqLMPool(
        OmegaConf.create({"plain": str(folders["a"]), "config": entry}),
        tokenizer=str(folders["a"]),
        model_kwargs=OmegaConf.create({"dtype": "float16"}),
    )
    assert isinstance(made, TheirPool)
    for model in made.models():
        assert type(model) is T5ForConditionalGeneration and model.dtype == torch.float16
    made.save_model(t5(1), str(tmp_path / "saved"))
    again = Seq2SeqLMPool({"x": str(tmp_path / "saved")}, tokenizer=str(tmp_path / "saved"))
    assert torch.equal(again.load_model("x").shared.weight, t5(1).shared.weight)
    assert again.load_tokenizer()("ab")["input_ids"] == [*text_tokenizer()("ab")["input_ids"]]


def test_the_pool_of_fusion_bench_is_not_enough(folders: dict[str, Path]) -> None:
    # What ours is for; if this fails, look whether it is still needed.
    theirs = TheirPool(OmegaConf.create({"plain": str(folders["a"])}), tokenizer=str(folders["a"]))
    with pytest.raises(ValueError, match="Unsupported model configuration type"):
        theirs.load_model("plain")
    with pytest.raises(TypeError):
        theirs.load_tokenizer()


@pytest.mark.parametrize("method", METHODS)
def test_merges_of_folders_are_scored_as_merges_in_memory(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = file_of(tmp_path)
    result = run(
        tmp_path / "run",
        f"method={method}",
        *METHODS[method][0],
        "modelpool=Seq2SeqLMPool/folders",
        *(f"++modelpool.models.{name}={path}" for name, path in folders.items()),
        f"modelpool.tokenizer={folders['a']}",
        "taskpool=Seq2SeqTaskPool/local_files",
        f"taskpool.tasks={{x: {{path: {file}, labels: [yes, no, maybe]}}}}".replace(
            "yes, no", "'yes', 'no'"
        ),
        f"merged_model_save_path={tmp_path / 'merged'}",
    )
    record = json.loads((tmp_path / "run" / "run_record.json").read_text())["taskpool"]
    models = {name: t5(seed) for seed, name in enumerate(NAMES)}
    task = {"x": {"path": file, "labels": LABELS}}
    expected = pool(task, folders).evaluate(merged(method, models))
    assert result["report"]["x"] == pytest.approx(expected["x"], rel=1e-4)
    assert [each["report"] for each in record["evaluations"]] == [result["report"]]
    assert record["config"]["tasks"]["x"]["labels"] == LABELS
    saved = Seq2SeqLMPool({"x": str(tmp_path / "merged")}, tokenizer=None).load_model("x")
    assert pool(task, folders).evaluate(saved)["x"] == pytest.approx(expected["x"], rel=1e-4)
