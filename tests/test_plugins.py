"""What installed packages add by entry points; `examples/plugin` is installed and used for real."""

import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fusion_upcycle import architectures, registry
from fusion_upcycle.architectures import (
    ARCHITECTURES,
    MOE_FAMILIES,
    OWN,
    architecture_for,
)
from fusion_upcycle.checks import describe, make_initialiser
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.registry import Registry

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugin"

USE = """
import sys
import torch
from tiny import dense_folder, edit_tensors, logits_of, load, tensors_of
from fusion_upcycle import MixtralForCausalLMUpscalingAlgorithm, UpcyclingOptions, expand, upcycle
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.verify import verify
from pathlib import Path

folder = Path(sys.argv[1])
source = dense_folder(folder / "dense", "qwen3")

# The family: exact against transformers' own forward pass, with every kind of shared expert.
for shared in ("copy", "none"):
    made = upcycle(source, folder / shared, target="dots1", shared_expert=shared, progress=False,
                   router_init={"name": "orthogonal", "norm": 1.5})
    assert made.proof.holds, made.proof
    reference = logits_of(load(source))
    assert (logits_of(load(folder / shared)) - reference).abs().max() < 1e-4 * reference.abs().max()
router = tensors_of(folder / "copy")["model.layers.0.mlp.gate.weight"]
assert torch.allclose(router.norm(dim=1), torch.tensor(1.5))

# The initialisers: recorded by name with all options, so that the result can be proven again.
made = upcycle(source, folder / "flipped", expert_init={"name": "flip", "share": 0.5},
               progress=False)
assert made.record["options"]["expert_init"] == {"name": "flip", "share": 0.5}
assert not made.proof.holds and verify(folder / "flipped", progress=False).mode == "layers"
assert UpcyclingOptions(expert_init="flip").to_json()["expert_init"]["share"] == 0.1
expand(folder / "copy", folder / "grown", expert_init="flip", progress=False)  # MoEs grow too

# Names are suggested; ours stay ours, and a class of one family refuses others.
try:
    upcycle(source, folder / "wrong", expert_init="flop")
except UpcyclingError as error:
    assert "Did you mean 'flip'" in str(error)
try:
    MixtralForCausalLMUpscalingAlgorithm(4, 2, target="dots1")
except UpcyclingError as error:
    assert "dots1" in str(error)
else:
    raise AssertionError
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package in a folder of its own, put there by pip."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, source)  # building leaves files
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", target, source], check=True)
    return target


@pytest.mark.early
def test_a_package_adds_initialisers_and_a_family(installed: Path, tmp_path: Path) -> None:
    path = f"{installed}:{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", USE, tmp_path],
        env={"PATH": "", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_help_names_what_a_package_adds(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusion_upcycle", "upcycle", "--help"],
        env={"PATH": "", "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("flip", "orthogonal", "dots1"):
        assert f" | {name}" in " ".join(done.stdout.split())


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """Entry points of the group `fusion_upcycle.toys`."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: found if "toys" in group else [])
    return found


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "fusion_upcycle.toys")


def ours(expert: Any, generator: Any) -> Any:
    return expert


def test_a_package_is_imported_only_when_it_is_asked_for(points: list[EntryPoint]) -> None:
    points.append(point("theirs", "no_such_package:init"))
    toys = Registry("toys", {"ours": ours})
    assert list(toys) == ["ours", "theirs"] and "theirs" in toys and len(toys) == 2
    assert toys["ours"] is ours
    with pytest.raises(UpcyclingError, match=r"toys=theirs of .*no_such_package.*cannot be loaded"):
        toys["theirs"]


def test_a_name_of_ours_stays_ours_and_that_is_said(points: list[EntryPoint]) -> None:
    points += [point("ours", "os.path:join"), point("theirs", f"{__name__}:theirs")]
    toys: Registry[Any] = Registry("toys", {"ours": ours})
    with pytest.warns(UserWarning, match=r"toys=ours of .*os\.path:join is not used"):
        assert list(toys) == ["ours", "theirs"]
    assert toys["ours"] is ours and toys["theirs"] is theirs


def test_two_packages_may_not_add_the_same_name(points: list[EntryPoint]) -> None:
    points += [point("theirs", "os.path:join"), point("theirs", "os.path:split")]
    toys = Registry("toys", {"ours": ours})
    assert list(toys) == ["ours", "theirs"] and toys["ours"] is ours  # nothing else is touched
    assert toys.name_of(theirs) is None
    with pytest.raises(UpcyclingError, match=r"toys=theirs is added by .*join and .*split"):
        toys["theirs"]


@pytest.mark.parametrize("name", ["broken", "auto", "mixtral"])
def test_a_broken_family_of_a_package_leaves_ours_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = list(ARCHITECTURES)  # which now knows its own entry points
    broken = EntryPoint(name, "no_such_package:FAMILY", "fusion_upcycle.architectures")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    families = ARCHITECTURES.plus()
    monkeypatch.setattr(architectures, "ARCHITECTURES", families)
    monkeypatch.setattr(architectures, "MOE_FAMILIES", families.plus(olmoe=MOE_FAMILIES["olmoe"]))
    monkeypatch.setattr(registry.warnings, "warn", lambda *_, **__: None)  # that a name is taken
    for architecture in ours:
        for dense in ARCHITECTURES[architecture].dense:
            assert architecture_for(dense).name in ours
        assert architecture_for(dense, architecture).name == architecture
        if architecture != OWN:  # one for each dense model
            assert MOE_FAMILIES[architecture].name == architecture
    if name != "mixtral":  # which may be what takes this model
        with pytest.raises(UpcyclingError, match=f"architectures={name} of .*cannot be loaded"):
            architecture_for("no_such_type")


def test_what_they_add_is_recorded_by_its_name(points: list[EntryPoint]) -> None:
    points.append(point("theirs", f"{__name__}:theirs"))
    toys: Registry[Any] = Registry("toys", {"ours": ours})
    made = make_initialiser({"name": "theirs", "size": 3}, toys, "toys")
    assert describe(made, toys) == {"name": "theirs", "size": 3}
    assert describe(ours, toys.without("ours")) == {"name": f"{__name__}.ours"}


def theirs(expert: Any, generator: Any, *, size: int = 1) -> Any:
    return expert


def test_a_family_is_an_architecture_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = EntryPoint("olmo9", "fusion_upcycle.architectures.mixtral:MIXTRAL", "any")
    monkeypatch.setattr(registry, "entry_points", lambda group: [wrong])
    families = ARCHITECTURES.plus()
    with pytest.raises(UpcyclingError, match="no Architecture named 'olmo9'"):
        families["olmo9"]
