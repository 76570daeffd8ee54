"""Options once: names, defaults and meanings come from the dataclasses, on every face."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from os import environ
from pathlib import Path
from typing import Any

import pytest
from fusion_bench.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from test_plugin import compose
from tiny import assert_same_bits
from tiny_moe import moe_model
from tiny_training import TOKENIZER

from fusion_upcycle import method
from fusion_upcycle.architectures import ARCHITECTURES
from fusion_upcycle.checks import DTYPES, TOLD
from fusion_upcycle.cli.option_flags import Command
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.expansion.options import ExpansionOptions, copy_inits
from fusion_upcycle.expansion.router.extension import CALIBRATED
from fusion_upcycle.expert_init import EXPERT_INITS
from fusion_upcycle.importance.scores import METRICS
from fusion_upcycle.merging.options import MergingOptions
from fusion_upcycle.merging.prototypes import prototype
from fusion_upcycle.options import (
    choice,
    choices,
    explained,
    make,
    markdown_table,
    meanings,
    names,
    registry,
    same_as,
    summaries,
)
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS
from fusion_upcycle.router_init import ROUTER_INITS
from fusion_upcycle.selection import SELECTIONS
from fusion_upcycle.training.options import TrainingOptions
from fusion_upcycle.upcycling.options import UpcyclingOptions

CONFIG = Path(__file__).resolve().parents[1] / "config" / "method"
ALL = (UpcyclingOptions, MergingOptions, ExpansionOptions, TrainingOptions)
every_dataclass = pytest.mark.parametrize("options", ALL)


# --- the text ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cake:
    """What decides a cake.

    Attributes:
        eggs: how many, 1 or more. Of hens,
            not of ducks.
        flour: of `rye`, say.
        icing: of the cake; by default none.

    Raises:
        ValueError: burnt.
    """

    eggs: int
    flour: str = choice("rye", lambda: ["rye", "oat"])
    icing: str | None = choice(None, ("lemon", "mint"))


@dataclass(frozen=True, kw_only=True)
class Tart:
    """What decides a tart.

    Attributes:
        crust: `thin` or `thick`.
        icing: as in `Cake`.
    """

    crust: str = choice("thin", ("thin", "thick"))
    icing: str | None = same_as(Cake, "icing")


def test_the_text_of_an_option_is_its_entry_in_the_docstring() -> None:
    assert meanings(Cake) == {
        "eggs": "how many, 1 or more. Of hens, not of ducks.",
        "flour": "of `rye`, say.",
        "icing": "of the cake; by default none.",
    }
    assert summaries(Cake) == {
        "eggs": "how many, 1 or more",
        "flour": "of `rye`, say",
        "icing": "of the cake; by default none",
    }


def test_an_option_of_another_dataclass_has_its_default_choices_and_text() -> None:
    assert (Tart().icing, meanings(Tart)["icing"]) == (None, meanings(Cake)["icing"])
    assert choices(fields(Tart)[1]) == ["lemon", "mint"]


def test_choices_are_said_once_and_those_of_a_registry_not_in_tables() -> None:
    assert markdown_table(Cake) == (
        "| option | default | meaning |\n"
        "| --- | --- | --- |\n"
        "| `eggs` | required | how many, 1 or more. Of hens, not of ducks. |\n"
        "| `flour` | `rye` | of `rye`, say. |\n"
        r"| `icing` | `null` | of the cake; by default none. Choices: `lemon` \| `mint`. |"
    )
    said = {field.name: text for field, text in explained(Cake)}
    assert said["flour"] == "of `rye`, say. Choices: `rye` | `oat`."
    assert next(text for _, text in explained(Tart)) == "`thin` or `thick`."


def test_a_name_that_is_unknown_or_missing_is_refused() -> None:
    assert make(Cake, {"eggs": 2}) == Cake(eggs=2)
    with pytest.raises(UpcyclingError, match=r"Unknown option 'egg'\. Did you mean 'eggs'"):
        make(Cake, {"egg": 2})
    for given in ({}, {"eggs": None}):
        with pytest.raises(UpcyclingError, match="eggs must be given: how many"):
            make(Cake, given)


@every_dataclass
def test_every_option_is_explained_in_a_sentence_that_fits_a_line(options: type) -> None:
    for name, summary in summaries(options).items():
        assert 5 < len(summary) < 145, name
    for field, text in zip(fields(options), meanings(options).values(), strict=True):
        assert text.endswith("."), field.name
        assert (field.default is None) == ("by default" in text), field.name


def bare(choices: list[str]) -> set[str]:
    """The names without their options."""
    return {name.partition(",")[0] for name in choices}


@every_dataclass
def test_a_text_names_no_choice_that_is_not_there(options: type) -> None:
    """As `svd`, `fisher` and `sampling` once were or were not, here and there."""
    known = {"down_proj", *names(options)}.union(*(choices(field) for field in fields(options)))
    for field in fields(options):
        if taken := bare(choices(field)):
            named = set(re.findall(r"`([a-z\d_-]+)`", meanings(options)[field.name]))
            assert named <= taken | known, field.name


# --- choices ----------------------------------------------------------------------------------


def flags_of(functions: Mapping[str, Callable[..., Any]]) -> set[str]:
    """Names and options of initialisers, as on the command line."""
    found = set()
    for name, function in functions.items():
        options = {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in TOLD
        }
        found.add(flag(name, options))
    return found


def flag(name: str, options: Mapping[str, Any]) -> str:
    return ",".join(
        [
            name,
            *(
                f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, value in options.items()
            ),
        ]
    )


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        (UpcyclingOptions, "target", {"auto", *ARCHITECTURES}),
        (UpcyclingOptions, "expert_init", flags_of(EXPERT_INITS)),
        (UpcyclingOptions, "router_init", flags_of(ROUTER_INITS)),
        (UpcyclingOptions, "dtype", set(DTYPES)),
        (MergingOptions, "target", {"auto", *ARCHITECTURES}),
        (MergingOptions, "expert_init", flags_of(EXPERT_INITS)),
        (MergingOptions, "router_init", flags_of(ROUTER_INITS.plus(prototype=prototype))),
        (ExpansionOptions, "selection", set(SELECTIONS)),
        (ExpansionOptions, "metric", set(METRICS)),
        (ExpansionOptions, "expert_init", flags_of(copy_inits())),
        (
            ExpansionOptions,
            "router_extension",
            flags_of(ROUTER_EXTENSIONS) | {flag(*item) for item in CALIBRATED.items()},
        ),
    ],
    # A set is written in another order by each of pytest's processes.
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, set) else "",
)
def test_the_choices_are_those_of_the_code(options: type, name: str, expected: set[str]) -> None:
    (found,) = (choices(field) for field in fields(options) if field.name == name)
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_families_go_by_their_own_names() -> None:
    assert [family.name for family in ARCHITECTURES.values()] == list(ARCHITECTURES)


def test_a_registry_that_is_not_there_is_no_empty_list() -> None:
    with pytest.raises(AssertionError, match=r"has no dict SELECTION$"):
        registry("selection.py", "SELECTION")()


# --- constructors -----------------------------------------------------------------------------


def sparse_upcycling(
    num_experts, experts_per_token, save_checkpoint=None, *, target="auto", granularity=1,
    expert_intermediate_size=None, moe_layers="all", routing="token_choice", router_scores="auto",
    capacity_factor=2.0, routing_group="batch", normalize_topk_prob=True, shared_expert="auto",
    shared_expert_intermediate_size=None, expert_init="copy", router_init="normal", dtype=None,
    seed=0, verify="auto", return_model=True, overwrite=False, max_shard_size="5GB",
    ignore_config_fields=(), part="whole", base=None, push_to_hub=None, **kwargs,
):  # fmt: skip
    """The signature before options had one home; `routing` and the three behind it are new.

    So are `part`, `base` and `push_to_hub`.
    """


def moe_merging(
    experts_per_token, save_checkpoint=None, *, shared="average", vocabulary="base",
    base_expert=False, experts_per_model=1, calibration=None, calibration_tokens=4096,
    statistics=False, router_init="normal",
    target="auto", moe_layers="all", normalize_topk_prob=True, expert_init="copy", dtype=None,
    seed=0, verify="auto", return_model=True, overwrite=False, max_shard_size="5GB",
    ignore_config_fields=(), part="whole", push_to_hub=None, **kwargs,
):  # fmt: skip
    """Likewise; `normalize_topk_prob`, `statistics`, `vocabulary` and `part` are new."""


def expert_upcycling(
    num_experts=None, save_checkpoint=None, *, multiplier=None, selection="uniform", max_copies=3,
    importance=None, calibration=None, expert_init="copy", router_extension="noise",
    experts_per_token=None, optimizer_state=None, new_moments="copy", tokenizer=None, seed=0,
    verify="auto", return_model=True, overwrite=False, max_shard_size="5GB", push_to_hub=None,
    **kwargs,
):  # fmt: skip
    """Likewise."""


def continued_pretraining(
    data, save_checkpoint=None, *, validation=None, tokenizer=None, processor=None,
    clip_model=None, optimizer_state=None, work_folder=None, resume=True, overwrite=False,
    progress=True, **kwargs,
):  # fmt: skip
    """Likewise; options were in `kwargs`, unseen; `processor` and `clip_model` are new."""


Parameters = dict[str, tuple[Any, Any]]
FACES: dict[str, tuple[Callable[..., Any], type]] = {
    "SparseUpcyclingAlgorithm": (sparse_upcycling, UpcyclingOptions),
    "MixtralUpscalingAlgorithm": (sparse_upcycling, UpcyclingOptions),
    "MixtralForCausalLMUpscalingAlgorithm": (sparse_upcycling, UpcyclingOptions),
    "MoEMergingAlgorithm": (moe_merging, MergingOptions),
    "MixtralMoEMergingAlgorithm": (moe_merging, MergingOptions),
    "MixtralForCausalLMMergingAlgorithm": (moe_merging, MergingOptions),
    "ExpertUpcyclingAlgorithm": (expert_upcycling, ExpansionOptions),
    "ContinuedPretrainingAlgorithm": (continued_pretraining, TrainingOptions),
}
#: In groups of their own.
ELSEWHERE = {"ExpertUpcyclingAlgorithm": {"metric"}}


def parameters(function: Callable[..., Any]) -> tuple[list[str], Parameters]:
    """Names of those that may be given by place, and kind and default of all but `**kwargs`."""
    found = inspect.signature(function).parameters.values()
    places = [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    return places, {p.name: (p.kind, p.default) for p in found if p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize("name", FACES)
def test_the_signature_is_what_it_was(name: str) -> None:
    places, expected = parameters(FACES[name][0])
    if name == "ContinuedPretrainingAlgorithm":
        expected |= {
            option.name: (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.empty if option.default is MISSING else option.default,
            )
            for option in fields(TrainingOptions)
        }
    assert parameters(getattr(method, name)) == (places, expected)
    assert names(FACES[name][1]) == [
        n for n in names(FACES[name][1]) if n in expected or n in ELSEWHERE.get(name, ())
    ]


def test_all_faces_are_here() -> None:
    without_options = {"UpcycleAndTrainAlgorithm", "ExpertAdditionAlgorithm"}
    assert {*FACES} | without_options == set(method.__all__)


#: Of no option's kind, each; text is what `"false"` in a YAML file is.
WRONG = (8.5, True, "false", [[8]], {"x": 1})
FREE_TEXT = {
    "save_checkpoint",
    "optimizer_state",
    "work_folder",
    "tokenizer",
    "processor",
    "clip_model",
}


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("name", FACES)
def test_a_value_of_another_kind_is_answered_in_our_words(name: str, value: Any) -> None:
    """Before any model is loaded, whatever the option; or it fits."""
    cls = getattr(method, name)
    given = {k: v for k, v in defaults(cls).items() if k != "_target_"}
    for option in parameters(cls)[1].keys() - FREE_TEXT:
        try:
            cls(**given | {option: value})
        except UpcyclingError as error:
            assert option.split("_")[0] in str(error), (option, error)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("SparseUpcyclingAlgorithm", {"overwrite": "false"}, "overwrite='false' must be true or"),
        ("SparseUpcyclingAlgorithm", {"return_model": "no"}, "return_model='no' must be true or"),
        ("ContinuedPretrainingAlgorithm", {"resume": "false"}, "resume='false' must be true or"),
        ("ContinuedPretrainingAlgorithm", {"betas": 0.9}, "betas=0.9 must be two numbers"),
        ("ExpertUpcyclingAlgorithm", {"selection": ["greedy"]}, "Unknown selection"),
        ("ExpertUpcyclingAlgorithm", {"importance": {"metric": ["load"]}}, "Unknown metric"),
        ("MoEMergingAlgorithm", {"experts_per_token": "2"}, "experts_per_token='2' must be"),
        ("MoEMergingAlgorithm", {"seed": "1"}, "seed='1' must be a whole number"),
        ("MoEMergingAlgorithm", {"calibration": "demo"}, "calibration='demo' must be a mapping"),
    ],
    ids=str,
)
def test_what_would_pass_for_something_else_is_refused(
    name: str, options: dict[str, Any], match: str
) -> None:
    cls = getattr(method, name)
    given = {k: v for k, v in defaults(cls).items() if k != "_target_"}
    with pytest.raises(UpcyclingError, match=match):
        cls(**given | options)


# --- YAML -------------------------------------------------------------------------------------

#: But for the one that has no dataclass of options: tests/test_addition.py has it.
METHODS = sorted({path.stem for path in CONFIG.glob("*.yaml")} - {"expert_addition"})
#: Files that say options themselves; others inherit from them.
HOMES = {
    "sparse_upcycling": UpcyclingOptions,
    "moe_merging": MergingOptions,
    "expert_upcycling": ExpansionOptions,
    "continued_pretraining": TrainingOptions,
}
NEEDED = ["method.data=demo", "method.tokens=8192"]


def composed(name: str) -> DictConfig:
    return compose(f"method={name}", *(NEEDED if name == "continued_pretraining" else ())).method


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"upcycle_and_train"}))
def test_the_yaml_lists_all_arguments_with_their_defaults(name: str) -> None:
    cfg = composed(name)
    made = instantiate(cfg, _recursive_=False)
    target = type(made).__name__
    _, arguments = parameters(type(made))
    assert set(cfg) == {"_target_", *arguments}
    options, groups = FACES[target][1], {"importance", "calibration"}
    required = {"tokens": 8192} if options is TrainingOptions else {}
    assert plain(made._options) == plain(options(**required))
    for argument in set(arguments) - set(names(options)) - groups - {"data"}:
        assert cfg[argument] == arguments[argument][1], argument


def plain(options: Any) -> Any:
    return options.to_json(2) if isinstance(options, MergingOptions) else options.to_json()


@pytest.mark.usefixtures("own_folder")
def test_the_yaml_of_the_chain_has_the_options_of_its_parts() -> None:
    chain = compose(
        "method=upcycle_and_train", *(word.replace(".", ".training.", 1) for word in NEEDED)
    ).method
    assert chain.upcycling == composed("sparse_upcycling")
    assert chain.training == composed("continued_pretraining")


def commented(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Keys of a YAML file, what is said beside each, and whether that is a choice of files."""
    pattern = re.compile(r"^ *(- )?(\w+): (?:[^#\n]*[^#\s])(?: # (.*))?$", re.MULTILINE)
    for dash, key, comment in pattern.findall(file.read_text(encoding="utf-8")):
        yield key, comment, bool(dash)


@pytest.mark.parametrize("name", HOMES)
def test_yaml_comments_begin_with_the_summary_of_the_option(name: str) -> None:
    said, options = summaries(HOMES[name]), {o.name: o for o in fields(HOMES[name])}
    seen = set()
    for key, comment, is_group in commented(CONFIG / f"{name}.yaml"):
        if key in said and (name, key) != ("expert_upcycling", "tokens"):
            summary = said[key].replace("`", "")
            assert comment.startswith(summary), f"{key}: {summary}"
            taken = bare(choices(options[key])) - {"auto"}
            named = taken & set(re.findall(r"[\w-]+", comment))
            assert is_group or named in (set(), taken), f"{key}: some of its choices only"
            seen.add(key)
    assert seen == set(said)


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_inherit_their_options(name: str) -> None:
    if name not in HOMES:
        assert {key for key, _, is_group in commented(CONFIG / f"{name}.yaml") if not is_group} <= {
            "_target_"
        }


# --- the config that repeats a run ------------------------------------------------------------

OTHER = {
    "sparse_upcycling": [
        "method.num_experts=3", "method.seed=5", "method.save_checkpoint=out",
        "method/expert_init=drop", "method.expert_init.drop_ratio=0.25",
        "method.moe_layers=[0,1]", "method.dtype=bfloat16", "method.overwrite=true",
        "method.ignore_config_fields=[note]",
    ],
    "mixtral_moe_upscaling": ["method/router_init=zeros", "method.granularity=2"],
    "moe_merging": [
        "method.shared=base", "method/router_init=prototype", "method.router_init.logit_std=2.0",
        "method.normalize_topk_prob=false", "method.calibration={math: [a.txt, b.txt]}",
    ],
    "mixtral_moe_merging": ["method.experts_per_model=2", "method/expert_init=noise"],
    "expert_upcycling": [
        "method.num_experts=6", "method.selection=greedy", "method.importance.metric=load",
        "method/router_extension=fit", "method.router_extension.steps=7",
        "method.calibration.data={sums: sums.txt}",
    ],
    "continued_pretraining": [
        *NEEDED, "method.learning_rate=0.01", "method.betas=[0.8, 0.9]", "method.freeze=[norms]",
        "method.mixture={prose: 0.5, source: 0.25, arithmetic: 0.25}", "method.schedule=wsd",
    ],
    "upcycle_and_train": [
        "method.training.data=demo", "method.training.tokens=8192",
        "method.training.learning_rate=0.01", "method.upcycling.num_experts=8",
        "method/expert_init@method.upcycling.expert_init=svd",
    ],
}  # fmt: skip


def test_every_method_is_saved_and_loaded() -> None:
    assert set(OTHER) == set(METHODS)


@pytest.mark.parametrize("name", OTHER)
def test_the_saved_config_makes_the_same_algorithm(name: str, own_folder: Path) -> None:
    made = instantiate(compose(f"method={name}", *OTHER[name]).method, _recursive_=False)
    made.to_yaml(own_folder / "config.yaml")
    again = type(made).from_yaml(own_folder / "config.yaml")
    assert OmegaConf.to_container(again.config) == OmegaConf.to_container(made.config)
    pairs = [(made, again)]
    if name == "upcycle_and_train":
        pairs = [(made._first, again._first), (made._second, again._second)]
    for before, after in pairs:
        assert type(after) is type(before)
        assert plain(after._options) == plain(before._options)
        assert plain(after._options) != plain(instantiate(defaults(type(before)))._options)
        for name in ("_inputs", "_calibration", "_data", "_writing", "_output", "_work"):
            assert getattr(after, name, None) == getattr(before, name, None), name


def defaults(cls: type) -> dict[str, Any]:
    required = {"data": "demo", "tokens": 8192, "num_experts": 4, "experts_per_token": 2}
    _, arguments = parameters(cls)
    needed = {
        n: required[n]
        for n, (_, value) in arguments.items()
        if value is MISSING_ARGUMENT or n == "tokens"
    }
    return {"_target_": f"fusion_upcycle.method.{cls.__name__}"} | needed


MISSING_ARGUMENT = inspect.Parameter.empty


@pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are
def test_the_saved_config_repeats_a_training(own_folder: Path) -> None:
    TOKENIZER.save_pretrained(own_folder / "tokenizer")
    overrides = {
        "method.data": "{numbers: {_target_: tiny_training.documents}}",
        "method.tokenizer": own_folder / "tokenizer",
        "method.tokens": 256,
        "method.context_length": 16,
        "method.batch_size": 4,
        "method.learning_rate": 0.05,
        "method.schedule": "constant",
        "method.weight_decay": 0.5,
        "method.seed": 3,
        "method.accelerator": "cpu",
        "method.progress": "false",
        "method.work_folder": own_folder / "first",
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    algorithm = instantiate(
        compose("method=continued_pretraining", *words).method, _recursive_=False
    )
    algorithm.to_yaml(own_folder / "config.yaml")
    first = algorithm.run(moe_model("mixtral", vocab_size=257)).state_dict()
    saved = OmegaConf.load(own_folder / "config.yaml")
    saved.work_folder = str(own_folder / "second")
    second = instantiate(saved).run(moe_model("mixtral", vocab_size=257)).state_dict()
    assert_same_bits(second, first)
    saved.work_folder, saved.learning_rate = str(own_folder / "third"), 2e-5
    third = instantiate(saved).run(moe_model("mixtral", vocab_size=257)).state_dict()
    assert any(not third[name].equal(tensor) for name, tensor in first.items())


# --- the command line -------------------------------------------------------------------------

QUICK_HELP = """
import sys
from fusion_upcycle.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    assert exit_.code == 0
heavy = {"torch", "transformers", "omegaconf", "yaml", "fusion_bench"} & set(sys.modules)
assert not heavy, heavy
"""
COMMANDS = {"upcycle": UpcyclingOptions, "merge": MergingOptions, "expand": ExpansionOptions}
COMMANDS["train"] = TrainingOptions


@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
def test_the_help_of_a_command_is_the_text_of_its_options_and_quick(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", QUICK_HELP, command, "--help"],
        check=True, capture_output=True, text=True, env=environ | {"COLUMNS": "1000"},
    )  # fmt: skip
    shown = " ".join(result.stdout.split())
    for field, text in explained(COMMANDS.get(command, UpcyclingOptions)):
        said = text.replace("`", "")
        if isinstance(field.default, str | int | float):
            said = f"{said.rstrip('.')} (default: {str(field.default).lower()})"
        elif isinstance(field.default, tuple) and field.default:
            said = f"{said.rstrip('.')} (default: {[*field.default]})"
        assert f" --{field.name.replace('_', '-')}" in shown
        assert f" {said}" in shown


def test_options_are_imported_for_the_called_command_only() -> None:
    code = QUICK_HELP + "assert {m for m in sys.modules if m.endswith('.options')} == {ONLY}"
    code = code.replace("ONLY", "'fusion_upcycle.options'")
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True)


def test_a_text_may_have_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse formats help texts; `schedule` of `TrainingOptions` has some."""
    parser = Command()
    parser.add_options("fusion_upcycle.training.options:TrainingOptions")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "5 % of the tokens" in " ".join(capsys.readouterr().out.split())
