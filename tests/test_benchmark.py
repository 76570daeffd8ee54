"""Experiments: what is read, refused, planned and asked of fusion_bench, before any run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fusion_upcycle.method
import fusion_upcycle.taskpool  # noqa: F401
from fusion_upcycle.benchmark import application
from fusion_upcycle.benchmark.application import config_tree, experiments
from fusion_upcycle.benchmark.board import Board
from fusion_upcycle.benchmark.experiment import Experiment, Validation, read_experiment
from fusion_upcycle.benchmark.overrides import override
from fusion_upcycle.benchmark.planning import Pool, plan_runs
from fusion_upcycle.benchmark.preparation import Plan, prepare, prepare_runs
from fusion_upcycle.benchmark.request import Request, read_request
from fusion_upcycle.benchmark.trials import choose
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.inspection.economics import economics
from fusion_upcycle.upcycling.options import make_options
from fusion_upcycle.upcycling.run import plan_folder

DEFAULTS: dict[str, Any] = {
    "experiment": "mine",
    "title": None,
    "modelpool": "CausalLMPool/demo",
    "taskpools": {"perplexity": "CausalLMPerplexityTaskPool/demo"},
    "methods": {},
    "validation": None,
    "references": True,
    "seeds": [0],
    "equal_trials": True,
    "overrides": [],
}
FOLDERS = {
    "config": "CausalLMPool/folders",
    "options": {"models": {"a": "./no/b"}, "tokenizer": "./no/b"},
}
VALIDATION = {
    "taskpools": {"perplexity": "CausalLMPerplexityTaskPool/demo"},
    "metric": "perplexity.average.bits_per_byte",
    "better": "lower",
}


KEYS = st.text("abcXYZ_0129.-/ ", max_size=6).map(lambda text: f"k{text}k")


@pytest.fixture(autouse=True)
def no_hydra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.chdir(tmp_path)
    yield


def experiment(**changes: Any) -> Experiment:
    return read_experiment(DEFAULTS | changes)


def planned(tmp_path: Path, **changes: Any) -> Plan:
    return prepare(experiment(**changes), tmp_path)


def requests(plan: Plan) -> dict[str, Request]:
    return {str(r.folder).split("/mine/")[-1]: r for _, found in plan for r in found}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(0), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_every_value_is_read_back_by_hydras_parser(value: Any) -> None:
    parsed = OverridesParser.create().parse_override(override("a.b", value))
    assert parsed.value() == value


def test_a_key_that_the_grammar_lacks_is_refused() -> None:
    with pytest.raises(UpcyclingError, match="as a key cannot be said"):
        override("a", {"1": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taskpools": {}}, r"taskpools is not set"),
        ({"modelpool": "???"}, r"modelpool is not set"),
        ({"methods": {"a": {"optoins": {}}}}, r"key of methods\.a: 'optoins'.*'options'"),
        ({"taskpools": {"p": {"config": "x", "beter": "lower"}}}, r"'beter'.*'better'"),
        ({"taskpools": {"p": {"config": "x", "better": "less"}}}, r"taskpools\.p\.better 'less'"),
        ({"taskpools": {"p-q": "x"}}, r"taskpools\.p-q: the name"),
        ({"seeds": []}, r"seeds=\[\] must be"),
        ({"seeds": [1, 1]}, r"names a seed twice"),
        ({"references": False}, r"nothing to run"),
        ({"methods": {"a": {"trials": {"x": 3}}}}, r"methods\.a\.trials\.x=3 must be a list"),
        ({"methods": {"a": {"trials": {"x": [3]}}}}, r"needs validation data"),
        ({"methods": {"a": {"folder": "/", "method": "b"}}}, r"exclude each other"),
        ({"methods": {"a": {"subsets": [0]}}}, r"methods\.a\.subsets"),
        ({"methods": {"a": {"folder": "./no"}}}, r"methods\.a\.folder=\./no is not a folder"),
        ({"validation": VALIDATION | {"better": "x"}}, r"validation\.better 'x'"),
        ({"validation": VALIDATION | {"metric": "ppl.average.x"}}, r"'ppl'.*Known: perplexity"),
        ({"validation": {"metric": "a"}}, r"validation\.taskpools is not set"),
    ],
)
def test_what_an_experiment_cannot_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        experiment(**changes)


def test_unequal_numbers_of_trials_are_refused_unless_allowed() -> None:
    methods = {
        "task_arithmetic": {"trials": {"scaling_factor": [0.1, 0.2]}},
        "ties_merging": {"trials": {"scaling_factor": [0.1], "threshold": [20]}},
    }
    with pytest.raises(UpcyclingError, match="task_arithmetic: 2, ties_merging: 1"):
        experiment(methods=methods, validation=VALIDATION)
    assert experiment(methods=methods, validation=VALIDATION, equal_trials=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"task_arithmetik": None}},
            r"=task_arithmetik .*Did you mean task_arithm",
        ),
        ({"modelpool": "CausalLMPool/dem"}, r"modelpool=CausalLMPool/dem .*CausalLMPool/demo"),
        ({"taskpools": {"p": "LMEvalTaskPool/lmeval"}}, r"LMEvalTaskPool/lm_eval"),
        (
            {"methods": {"task_arithmetic": {"options": {"scaling_facto": 1}}}},
            r"'scaling_facto'\. Did you mean 'scaling_factor'",
        ),
        (
            {"methods": {"moe_merging": {"options": {"router_init.logits_std": 1}}}},
            r"options\.router_init: 'logits_std'\. Did you mean 'logit_std'",
        ),
        (
            {"taskpools": {"p": {"config": "ModelCostTaskPool/cost", "options": {"repeat": 1}}}},
            r"p\.options: 'repeat'\. Did you mean 'repeats'",
        ),
        (
            {"modelpool": {"config": "CausalLMPool/demo", "options": {"models": {"x": "basis"}}}},
            r"demo model 'basis'",
        ),
        (
            {"modelpool": FOLDERS},
            r"Fine-tuned \(a\): modelpool\.models\.a=.*no/b.* is not a folder",
        ),
        (
            {"taskpools": {"p": {"config": "LMEvalTaskPool/lm_eval", "options": {"tasks": []}}}},
            r"taskpool\.tasks is empty",
        ),
        ({"taskpools": {"p": "LMEvalTaskPool/lm_eval"}}, r"taskpool\.pools\.p\.tasks is not set"),
        ({"methods": {"continued_pretraining": None}}, r"method\.data.* is not set"),
        ({"methods": {"slerp/slerp_lm": {"subsets": 4}}}, r"has 3 fine-tunes only"),
        (
            {"methods": {"a b": {"method": "dummy"}, "a/b": {"method": "dummy"}}},
            r"share the fold",
        ),
    ],
)
def test_what_fusion_bench_lacks_is_refused_before_the_first_run(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UpcyclingError, match=message):
        planned(tmp_path, **changes)


def test_references_methods_seeds_and_subsets_become_runs(tmp_path: Path) -> None:
    plan = planned(
        tmp_path / "mine",
        seeds=[0, 1],
        methods={
            "simple_average": {"seeds": [0]},
            "moe_merging": {"label": "MoE"},
            "slerp": {"method": "slerp/slerp_lm", "subsets": 2, "pretrained": False, "seeds": [0]},
        },
    )
    found = requests(plan)
    assert list(found) == [
        "references/pretrained",
        "references/prose",
        "references/source",
        "references/arithmetic",
        "simple_average",
        "moe_merging/seed_0",
        "moe_merging/seed_1",
        "slerp/prose+source",
        "slerp/prose+arithmetic",
        "slerp/source+arithmetic",
    ]
    tuned = found["references/source"]
    assert {"~modelpool.models._pretrained_", "~modelpool.models.prose"} < set(tuned.arguments)
    assert "~modelpool.models.source" not in tuned.arguments
    assert tuned.facts["reference"] == "finetuned" and tuned.facts["models"] == ["source"]
    assert "method.seed=1" in found["moe_merging/seed_1"].arguments
    assert found["moe_merging/seed_1"].facts["seed"] == 1
    assert found["moe_merging/seed_0"].facts["group"] == "Model Mixing"
    assert found["simple_average"].facts["group"] == "Model Merging"
    pair = found["slerp/prose+source"]
    assert pair.facts["subset"] and pair.facts["models"] == ["prose", "source"]
    assert "~modelpool.models._pretrained_" in pair.arguments
    hashes = {request.config_hash for request in found.values()}
    assert len(hashes) == len(found)


def test_the_hash_is_of_the_config_and_not_of_the_place(tmp_path: Path) -> None:
    methods = {"task_arithmetic": {"options": {"scaling_factor": 0.3}}}

    def hashed(place: str, **changes: Any) -> str:
        found = planned(tmp_path / place / "mine", references=False, **changes)
        return found[0][1][0].config_hash

    first = hashed("a", methods=methods)
    assert hashed("b", methods=methods) == first
    labelled = {"task_arithmetic": {**methods["task_arithmetic"], "label": "TA"}}
    assert hashed("a", methods=labelled) == first
    other = {"task_arithmetic": {"options": {"scaling_factor": 0.4}}}
    assert hashed("a", methods=other) != first
    assert hashed("a", methods=methods, seeds=[1]) != first


def test_what_is_asked_is_what_fusion_bench_composes(tmp_path: Path) -> None:
    """Options are set after composing; the command line must give the same."""
    from fusion_upcycle.benchmark import composition

    methods = {
        "moe_merging": {
            "overrides": ["method/router_init=prototype"],
            "options": {"router_init.logit_std": 2.0, "calibration": {"a": "x, y.txt"}},
        }
    }
    request = planned(tmp_path, references=False, methods=methods)[0][1][0]
    with composition.composing():
        composed = composition.composed(request.arguments)
        kept = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
        resolved = composition.resolve(kept)
    assert composition.config_hash(resolved, request.folder) == request.config_hash
    assert resolved["method"]["router_init"]["logit_std"] == 2.0
    assert resolved["method"]["calibration"] == {"a": "x, y.txt"}


def test_trials_are_planned_and_the_best_is_chosen(tmp_path: Path) -> None:
    methods = {
        "task_arithmetic": {
            "options": {"scaling_factor": 0.9},
            "trials": {"scaling_factor": [0.1, 0.2, 0.3, 0.4]},
        }
    }
    changes = {"methods": methods, "validation": VALIDATION, "references": False}
    ((row, trials),) = planned(tmp_path, **changes)
    assert [t.facts["settings"] for t in trials] == [
        {"scaling_factor": value} for value in (0.1, 0.2, 0.3, 0.4)
    ]
    assert all(t.facts["purpose"] == "trial" for t in trials)
    for trial, bits in zip(trials, (2.0, 1.5, None, 1.5), strict=True):
        trial.write()
        report = {"perplexity": {"average": {"bits_per_byte": bits}}}
        trial.leave(None, report, {"wall_seconds": 1.0})
    trials[0].leave("broken", {}, {})
    read = experiment(**changes).validation
    assert isinstance(read, Validation)
    chosen = choose(trials, ["scaling_factor"], read)
    assert chosen == {"scaling_factor": 0.2}  # the first of equals
    (settled,) = prepare_runs([row.with_settings(chosen)], tmp_path)
    assert settled.facts["trials"] == 4 and settled.facts["settings"] == chosen
    assert settled.facts["purpose"] == "test"
    assert "++method.scaling_factor=0.2" in settled.arguments


def test_no_trial_with_the_metric_is_an_error(tmp_path: Path) -> None:
    request = Request(tmp_path / "t", (), "h", {"settings": {"x": 1}})
    request.write()
    request.leave("it broke", {}, {})
    by = Validation(taskpools={}, metric="p.average.m", better="higher")
    with pytest.raises(UpcyclingError, match=r"No trial gave.*it broke"):
        choose([request], ["x"], by)


@pytest.mark.parametrize(
    ("pool", "options", "expected"),
    [
        ("CausalLMPool/demo", {}, ["modelpool=CausalLMPool/folders", "modelpool.tokenizer={}"]),
        (
            "Seq2SeqLMPool/folders",
            {"tokenizer": "x"},
            ["modelpool=Seq2SeqLMPool/folders", "modelpool.tokenizer={}"],
        ),
        ("CLIPVisionModelPool/folders", {}, ["modelpool=CLIPVisionModelPool/folders"]),
        (
            "ImageClassificationModelPool/folders",
            {"processor": "./vit"},
            ["modelpool=ImageClassificationModelPool/folders", "modelpool.processor=./vit"],
        ),
    ],
)
def test_a_model_made_elsewhere_is_in_a_pool_of_the_kind_of_the_others(
    pool: str, options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    choice = {"config": pool, "options": {"models": {"a": str(tmp_path)}, **options}}
    mine = experiment(
        modelpool=choice, methods={"moe": {"folder": str(tmp_path)}}, references=False
    )
    (found,) = plan_runs(mine, lambda choice: Pool(choice, ["a"]))
    wanted = [text.replace("{}", str(tmp_path)) for text in expected]
    wanted.append(f"+modelpool.models._pretrained_={tmp_path}")
    given = [text.replace("'", "") for text in found.run.arguments if "modelpool" in text]
    assert sorted(given) == sorted(wanted)


def request_in(folder: Path, config_hash: str = "h", **facts: Any) -> Request:
    return Request(folder, ("method=dummy",), config_hash, {"row": "A", **facts})


def test_a_run_is_complete_with_its_config_only(tmp_path: Path) -> None:
    request = request_in(tmp_path / "r")
    assert not request.complete
    request.write()
    assert read_request(request.folder) == request and not request.complete
    request.leave(None, {"p": {"t": {"m": float("nan")}}}, {})
    assert request.complete
    result = request.result()
    assert result is not None and result["report"] == {"p": {"t": {"m": None}}}
    assert not request_in(tmp_path / "r", "other").complete
    request.leave("failed", {}, {})
    assert not request.complete


def test_another_config_starts_over_and_the_same_goes_on(tmp_path: Path) -> None:
    request = request_in(tmp_path / "r")
    request.write()
    (request.folder / "training").mkdir()
    request.write()
    assert (request.folder / "training").is_dir()
    request_in(tmp_path / "r", "other").write()
    assert not (request.folder / "training").exists()


def test_what_no_benchmark_made_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(UpcyclingError, match="holds something that no benchmark made"):
        request_in(tmp_path / "r").write()
    assert (tmp_path / "r" / "thesis.txt").read_text() == "mine"


def test_labels_of_complete_runs_follow_the_experiment(tmp_path: Path) -> None:
    request = request_in(tmp_path / "r")
    request.write()
    request.leave(None, {"p": {}}, {})
    renamed = Request(request.folder, request.arguments, "h", {"row": "B"})
    renamed.refresh()
    result = renamed.result()
    assert result is not None and result["row"] == "B" and result["status"] == "done"


def test_the_board_counts_and_tells_the_time_left(tmp_path: Path, capsys: Any) -> None:
    facts = {"models": [], "subset": False, "settings": {}, "purpose": "test"}
    runs = [request_in(tmp_path / str(i), **facts) for i in range(3)]
    with Board(runs, jobs=1) as board:
        assert board.seconds_left() is None
        board.started(runs[0])
        runs[0].write()
        runs[0].leave("x" * 1000, {}, {})
        board.ended(runs[0])
        left = board.seconds_left()
        assert left is not None and left < 10
    said = capsys.readouterr().err
    assert said.startswith("failed: A: xxx") and len(said) < 400


def test_the_shipped_experiments_compose_and_are_read() -> None:
    assert "three_domains" in experiments()
    for name in experiments():
        with initialize_config_dir(str(config_tree()), version_base="1.3"):
            overrides = [f"benchmark@_global_={name}", f"experiment={name}"]
            cfg = compose("benchmark", overrides)
        content = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(content, dict)
        read_experiment({str(key): value for key, value in content.items()})


def test_dense_and_upcycled_are_trained_with_the_same_flops() -> None:
    node = OmegaConf.load(config_tree() / "benchmark" / "three_domains.yaml").methods
    dense, sparse = node.dense_trained.options, node.upcycled_trained.options
    experts = {n: sparse[f"upcycling.{n}"] for n in ("num_experts", "experts_per_token")}
    from fusion_upcycle.demo import demo_model

    costs = economics(plan_folder(demo_model("base"), make_options(**experts)), 128)
    equal = dense.tokens * costs.dense.flops / costs.upcycled.flops
    assert sparse["training.tokens"] == round(equal)
    for name, value in dense.items():
        if name != "tokens":
            assert sparse[f"training.{name}"] == value, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"experiment is not set: experiment=NAME \(.*three_domains"),
        (["experiment=three_domain"], r"Did you mean 'three_domains'"),
        (["experiment=./no.yaml"], r"experiment=no\.yaml is not a file"),
    ],
)
def test_an_unknown_experiment_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        application.main(arguments)
