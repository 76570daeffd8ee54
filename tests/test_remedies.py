"""Remedies in errors work when pasted where they appear: on the command line, in Hydra, in Python.

Each case provokes an error, takes the remedy out of the error's text, and runs with it.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fusion_bench.modelpool import CausalLMPool
from fusion_bench.utils import instantiate
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from test_plugin import compose
from tiny import dense_folder, dense_model, edit_config, edit_tensors
from tiny_moe import moe_folder

from fusion_upcycle import SparseUpcyclingAlgorithm, upcycle
from fusion_upcycle.cli import main
from fusion_upcycle.cli.spelling import flags_of
from fusion_upcycle.demo.tokenizer import byte_tokenizer
from fusion_upcycle.errors import UpcyclingError, setting, spelled
from fusion_upcycle.method.spelling import overrides_at

_WORD = r"(?:'[^']*'|[\w/=\[](?:[^\s']*[^\s',.;])?)"
#: A flag with its value, if it has one, as in "pass --target sparse, our own class".
_FLAG = rf"--[a-z-]+(?: (?!or |to |and |with |that |unless ){_WORD})?"
#: An override in quotes for a shell, or without: `'method.x=[y]'`, `method/router_init=zeros`.
_OVERRIDE = r"'method[./][^']+'|method[./][\w./@]+=[\w./-]*\w"
_ARGUMENT = r"\b\w+=(?:\[[^]]*\]|\{[^}]*\}|\"[^\"]*\"|[\w.]+)"


def found(pattern: str, text: str) -> list[str]:
    """The remedies of an error, after what it says is wrong."""
    return re.findall(pattern, text)


def on_the_command_line(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    which: int = 0,
    fill: Callable[[str], str] = str,
) -> None:
    """Run a command that fails, then again with the remedy of its error behind it."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    said = capsys.readouterr().err
    assert exit_.value.code == 2, said
    remedy = fill(found(_FLAG, said)[which])
    main([*arguments, *shlex.split(remedy)])


def nothing(_: Path) -> None:
    """A source as it is."""


def mixed(source: Path) -> None:
    edit_config(source, dtype=None, torch_dtype=None)
    edit_tensors(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].half()}))


def large(source: Path) -> None:
    edit_tensors(source, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(1e6))


def with_code(source: Path) -> None:
    edit_config(source, auto_map={"AutoConfig": "configuration_x.XConfig"})


#: What is done to a tiny Llama, options that do not fit it, and which of the remedies is pasted.
UPCYCLE: list[tuple[Callable[[Path], None], str, int]] = [
    (nothing, "--moe-layers 1 --target mixtral", 0),
    (nothing, "--routing hash --target mixtral", 0),
    (nothing, "--router-scores sigmoid --target mixtral", 0),
    (nothing, "--expert-intermediate-size 20", 0),
    (nothing, "--routing hash --target sparse --granularity 2 --num-experts 4", 0),
    (nothing, "--router-init normal,std=0", 0),
    (nothing, "--target qwen2_moe --shared-expert copy --shared-expert-intermediate-size 8", 0),
    (nothing, "--moe-layers 1 --target mixtral --ignore-config-fields anything", 0),
    (mixed, "", 0),
    (large, "--dtype float16", 0),
    (with_code, "", 0),
    (with_code, "--target sparse --ignore-config-fields anything", 0),
]


@pytest.mark.parametrize(("edit", "options", "which"), UPCYCLE)
def test_remedies_of_upcycle_work_on_the_command_line(
    edit: Callable[[Path], None],
    options: str,
    which: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = dense_folder(tmp_path / "dense")
    edit(source)
    run = ["upcycle", str(source), str(tmp_path / "out"), "--verify", "none", "--quiet"]
    on_the_command_line([*run, *options.split()], capsys, which)
    assert (tmp_path / "out" / "config.json").is_file()
    if options:
        return
    with pytest.raises(SystemExit):  # it is there now
        main(run)
    assert "Pass --overwrite to replace it" in capsys.readouterr().err


EXPAND = [
    ("--router-extension split", 1),
    ("--router-extension split", 0),
    ("--num-experts 16 --selection random --max-copies 2", 0),
    ("--num-experts 16 --selection random --max-copies 2", 1),
    ("--router-extension noise,noise_std=0", 0),
    ("--selection greedy", 1),
    ("--demo", 0),
]


@pytest.mark.parametrize(("options", "which"), EXPAND)
def test_remedies_of_expand_work_on_the_command_line(
    options: str, which: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = moe_folder(tmp_path / "moe", "mixtral", vocab_size=300)
    text = tmp_path / "text.txt"
    text.write_text("some text of an ordinary kind. " * 400)
    byte_tokenizer(64).save_pretrained(source)
    run = ["expand", str(source), str(tmp_path / "out"), "--verify", "none", "--quiet"]
    run += ["--context-length", "16", "--tokens", "256"]
    on_the_command_line(
        [*run, *options.split()], capsys, which, lambda remedy: remedy.replace("FILE", str(text))
    )
    assert (tmp_path / "out" / "config.json").is_file()


MERGE = [
    ("--model a=A --base B", ["--base-expert"]),
    ("--model a=A --model b=B --router-init prototype", ["--router-init normal"]),
    ("--model a=A --model b=B --router-init prototype,ridge=0.1", ["--calibration"]),
    ("--model a=A --model b=B --calibration a=TEXT --calibration b=TEXT", ["--router-init"]),
    ("--model a=A --model b=HALF", ["--dtype"]),
]


@pytest.mark.parametrize(("options", "begins"), MERGE)
def test_remedies_of_merge_work_on_the_command_line(
    options: str, begins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("A", 0), ("B", 1)):
        dense_folder(tmp_path / name, seed=seed, vocab_size=300)
        byte_tokenizer(64).save_pretrained(tmp_path / name)
    (tmp_path / "TEXT.txt").write_text("some text of an ordinary kind. " * 2000)
    (tmp_path / "b.txt").write_text("another text, 1 2 3 4 5 6 7 8. " * 2000)
    dense_model(seed=1, vocab_size=300).half().save_pretrained(tmp_path / "HALF")
    byte_tokenizer(64).save_pretrained(tmp_path / "HALF")
    for name in ("A", "B", "HALF"):
        options = options.replace(f"={name}", f"={tmp_path / name}")
    options = options.replace("b=TEXT", f"b={tmp_path}/b.txt")
    options = options.replace("TEXT", f"{tmp_path}/TEXT.txt").replace(
        "base B", f"base {tmp_path}/B"
    )
    run = ["merge", str(tmp_path / "out"), "--verify", "none", "--quiet", *options.split()]
    with pytest.raises(SystemExit):
        main(run)
    remedies = [r for r in found(_FLAG, capsys.readouterr().err) if r.startswith(begins[0])]
    remedy = " ".join(remedies).replace("b=FILE", f"b={tmp_path}/b.txt")
    remedy = remedy.replace("FILE", f"{tmp_path}/TEXT.txt")
    main([*run, *shlex.split(remedy)])
    assert (tmp_path / "out" / "config.json").is_file()


# --- Hydra and Python ---------------------------------------------------------------------------


def pool_of(*folders: Path) -> CausalLMPool:
    """The first is the base; the others have the names of their folders."""
    names = ["_pretrained_", *(folder.name for folder in folders[1:])]
    entries = {name: str(folder) for name, folder in zip(names, folders, strict=True)}
    return CausalLMPool(OmegaConf.create(entries), tokenizer=None)


def method(*overrides: str) -> Any:
    try:
        return instantiate(compose(*overrides).method, _recursive_=False)
    except InstantiationException as error:  # the last of which our hydra plugin looks for
        ours: BaseException | None = error
        while ours is not None and not isinstance(ours, UpcyclingError):
            ours = ours.__cause__
        assert ours is not None
        raise ours from error


HYDRA: list[tuple[Callable[[Path], None], str, int]] = [
    (with_code, "method.ignore_config_fields=[anything]", 0),
    (nothing, "method.moe_layers=[1] method.target=mixtral", 0),
    (nothing, "method.router_init.std=0", 0),
    (mixed, "", 0),
]


@pytest.mark.parametrize(("edit", "options", "which"), HYDRA)
def test_remedies_work_as_overrides(
    edit: Callable[[Path], None], options: str, which: int, tmp_path: Path
) -> None:
    source, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    edit(source)
    given = ["method=sparse_upcycling", "method.verify=none", f"method.save_checkpoint={out}"]
    given += options.split()
    with pytest.raises(UpcyclingError) as error:
        method(*given).run(pool_of(source))
    remedy = found(_OVERRIDE, str(error.value))[which]
    method(*given, *shlex.split(remedy)).run(pool_of(source))
    with pytest.raises(UpcyclingError, match=r"Pass method\.overwrite=true to replace"):
        method(*given, *shlex.split(remedy)).run(pool_of(source))


def test_remedies_of_a_part_of_a_method_say_where_it_is(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", vocab_size=300)
    byte_tokenizer(64).save_pretrained(source)
    given = ["method=upcycle_and_train", "method.training.data=demo", "method.training.tokens=9000"]
    given += [f"method.training.work_folder={tmp_path / 'work'}"]
    with pytest.raises(UpcyclingError) as error:
        method(*given, "method.upcycling.router_init.std=0")
    remedy = found(_OVERRIDE, str(error.value))[0]
    assert remedy == "method.upcycling.router_init=zeros"
    method(*given, "method.upcycling.router_init.std=0", remedy)
    with pytest.raises(UpcyclingError, match=r"or method\.training\.bias_update_after=0"):
        method(*given, "method.training.bias_update_after=0.5")


def test_remedies_of_recipes_and_merges_are_overrides(tmp_path: Path) -> None:
    broken = ["method=recipes/mixtral_8x7b", "method.router_init.std=0"]
    with pytest.raises(UpcyclingError) as error:
        method(*broken)
    method(*broken, *found(_OVERRIDE, str(error.value)))

    base, other = (dense_folder(tmp_path / n, vocab_size=300, seed=s) for s, n in enumerate("bo"))
    for folder in (base, other):
        byte_tokenizer(64).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("some text of an ordinary kind. " * 2000)
    given = ["method=moe_merging", "method.verify=none", f"method.save_checkpoint={tmp_path}/out"]
    with pytest.raises(UpcyclingError) as error:
        method(*given).run(pool_of(base, other))
    given += found(_OVERRIDE, str(error.value))
    assert given[-1] == "method.base_expert=true"
    with pytest.raises(UpcyclingError) as error:
        method(*given, "method/router_init=prototype").run(pool_of(base, other))
    calibration, without = found(_OVERRIDE, str(error.value))
    method(*given, "method/router_init=prototype", without).run(pool_of(base, other))
    (calibration,) = shlex.split(calibration.replace("FILE", str(text)))
    with pytest.raises(UpcyclingError, match="the same mean router input"):  # it has been read
        method(*given, "method.overwrite=true", "method/router_init=prototype", calibration).run(
            pool_of(base, other)
        )


PYTHON: list[tuple[Callable[[Path], None], dict[str, Any], int]] = [
    (with_code, {}, 0),
    (nothing, {"moe_layers": [1], "target": "mixtral"}, 0),
    (nothing, {"router_init": {"name": "normal", "std": 0}}, 0),
]


@pytest.mark.parametrize(("edit", "options", "which"), PYTHON)
def test_remedies_work_as_python(
    edit: Callable[[Path], None], options: dict[str, Any], which: int, tmp_path: Path
) -> None:
    source = dense_folder(tmp_path / "dense")
    edit(source)

    def with_remedy(run: Callable[..., object], **given: Any) -> None:
        with pytest.raises(UpcyclingError) as error:
            run(**given)
        said = str(error.value)
        remedy = found(_ARGUMENT, said[re.search(r"[.;] ", said).end() :])[which]
        run(**given | eval(f"dict({remedy})"))  # a pasted argument

    def ours(**given: Any) -> None:
        upcycle(source, tmp_path / "out", progress=False, verify="none", **given)

    def theirs(**given: Any) -> None:
        SparseUpcyclingAlgorithm(4, 2, str(tmp_path / "two"), verify="none", **given).run(
            pool_of(source)
        )

    for run in (ours, theirs):
        with_remedy(run, **options)
    with pytest.raises(UpcyclingError, match="Pass overwrite=True to replace"):
        upcycle(source, tmp_path / "out", progress=False, verify="none")


@pytest.mark.parametrize(
    ("option", "python", "flags", "override"),
    [
        (("x_y", ["a", "b c"]), 'x_y=["a", "b c"]', "--x-y 'a,b c'", """'m.x_y=[a,"b c"]'"""),
        (("x_y", True), "x_y=True", "--x-y", "m.x_y=true"),
        (("x_y", False), "x_y=False", "--no-x-y", "m.x_y=false"),
        (("x_y", None), "x_y=None", "no --x-y", "m.x_y=null"),
        (("x_y", "null"), 'x_y="null"', "--x-y null", """'m.x_y="null"'"""),
        (("x_y", {"a": 1, "b": [2]}), 'x_y={"a": 1, "b": [2]}', "--x-y a=1,b=2", "'m.x_y={a:1,b:[2]}'"),  # noqa: E501
        (("x_y",), "x_y", "--x-y", "m.x_y"),
        (("e", {"name": "n", "x": 0.1}), 'e={"name": "n", "x": 0.1}', "--e n,x=0.1", "'m.e={name:n,x:0.1}'"),  # noqa: E501
        (("resume", False), "resume=False", "--start-over", "m.resume=false"),
    ],
)  # fmt: skip
def test_an_option_is_spelled_as_where_it_appears(
    option: tuple[Any, ...], python: str, flags: str, override: str
) -> None:
    assert setting(*option) == python
    with spelled(flags_of("train")):
        assert setting(*option) == flags
    with spelled(overrides_at("m")):
        assert setting(*option) == override
