"""The checklists of docs/extending.md, followed with toys in a copy: what they name is enough.

The copy is changed in the files that a checklist names, and nowhere else; then the tests that hold
the registries, configs and options together run there.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "plugin" / "fusion_upcycle_example"

Edit = str | Callable[[str], str]


def after(marker: str, text: str) -> Callable[[str], str]:
    """Insert behind a marker, which must be there once."""

    def edit(old: str) -> str:
        assert old.count(marker) == 1, marker
        return old.replace(marker, marker + text)

    return edit


def at_the_end(text: str) -> Callable[[str], str]:
    return lambda old: old + text


FLIP = '''

@EXPERT_INITS.add
def flip(expert: Expert, generator: Generator, *, share: float = 0.1) -> Expert:
    """Turn the sign of a share of the neurons' outputs."""
    flipped = torch.rand(expert.down_proj_DF.shape[1], generator=generator) < share
    return expert.map(lambda down_DF: torch.where(flipped, -down_DF, down_DF), ["down_proj_DF"])
'''

TASK_POOL = '''"""How many parameters a model has."""

from typing import Any

from fusion_bench import BaseTaskPool
from fusion_bench.mixins import auto_register_config

from fusion_upcycle.report import write_run_record


@auto_register_config
class CountingTaskPool(BaseTaskPool):
    """Parameters in units of `unit`."""

    def __init__(self, unit: int = 1, **kwargs: Any):
        super().__init__(**kwargs)

    def evaluate(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        report = {"parameters": model.num_parameters() / self.unit}
        write_run_record("taskpool", report)
        return report
'''

#: Section of docs/extending.md -> file -> what the toy does to it; the text of a new one.
TOYS: dict[str, dict[str, Edit]] = {
    "An initialiser": {
        "fusion_upcycle/expert_init.py": at_the_end(FLIP),
        "config/method/expert_init/flip.yaml": """\
_target_: fusion_upcycle.expert_init.flip
_partial_: true
share: 0.1 # of the neurons
""",
        "tests/test_expert_init.py": at_the_end("""

def test_flip_turns_signs() -> None:
    source = Expert(torch.ones(4, 3), torch.ones(4, 3), torch.ones(3, 4))
    made = EXPERT_INITS["flip"](source, torch.Generator(), share=1.0)
    assert torch.equal(made.down_proj_DF, -source.down_proj_DF)
"""),
    },
    "A selection": {
        "fusion_upcycle/selection.py": lambda old: after(
            '    "uniform": _uniform,\n', '    "last": _last,\n'
        )(
            old.replace(
                "SELECTIONS: dict",
                """def _last(scores: Tensor, count: int, room: int, _: Generator) -> list[int]:
    return _greedy(torch.arange(len(scores)), count, room, _)


SELECTIONS: dict""",
            )
        ),
        "tests/test_selection.py": at_the_end("""

def test_last_copies_the_last_experts() -> None:
    assert select({0: [5.0, 1.0]}, 3, selection="last").source_experts == {0: (0, 1, 1)}
"""),
    },
    "A family": {
        "fusion_upcycle/architectures/dots1.py": (PLUGIN / "dots1.py").read_text("utf-8"),
        "fusion_upcycle/architectures/__init__.py": lambda old: after(
            '        "glm4_moe": GLM4_MOE,\n', '        "dots1": DOTS1,\n'
        )(
            old.replace(
                "from fusion_upcycle.architectures.ernie",
                "from fusion_upcycle.architectures.dots1 import DOTS1\n"
                "from fusion_upcycle.architectures.ernie",
            )
        ),
        "tests/test_families.py": after(
            '    ("llama", {}, "mixtral", {}),\n', '    ("qwen3", {"head_dim": 12}, "dots1", {}),\n'
        ),
    },
    "A task pool": {
        "fusion_upcycle/taskpool/counting.py": TASK_POOL,
        "fusion_upcycle/taskpool/__init__.py": lambda old: old.replace(
            "__all__ = [",
            "from fusion_upcycle.taskpool.counting import CountingTaskPool\n\n"
            '__all__ = ["CountingTaskPool", ',
        ),
        "config/taskpool/CountingTaskPool/millions.yaml": """\
_target_: fusion_upcycle.taskpool.CountingTaskPool
unit: 1000000
""",
        "tests/test_counting.py": """\
from hydra.utils import instantiate
from test_plugin import compose
from tiny import dense_model


def test_parameters_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pool = instantiate(compose("taskpool=CountingTaskPool/millions").taskpool)
    model = dense_model("llama")
    assert pool.evaluate(model) == {"parameters": model.num_parameters() / 1e6}
""",
    },
}

TOYS["A merging baseline"] = {
    "examples/merges/half_way.yaml": """\
method:
  _target_: fusion_bench.method.TaskArithmeticAlgorithm
  scaling_factor: 0.5
""",
    "tests/test_half_way.py": """\
from test_readme import example


def test_a_baseline_is_compared() -> None:
    assert "half_way" in [way.name for way in example("merging.py").ways()]
""",
}

#: What holds a checkout together: every registry, config and option, and the toys' own tests.
CHECKS = [
    "tests/test_options_once.py",
    "tests/test_counting.py",
    "tests/test_half_way.py",
    "tests/test_readme.py::test_the_families_of_the_record_are_families",
    *(f"tests/test_{name}.py" for name in ("expert_init", "selection", "plugin", "packaging")),
    *(f"tests/test_{name}.py" for name in ("families", "expansion", "live")),
]
CHOSEN = (
    "flip or last or dots1 or matrix or choices or millions or counted or compared or folders "
    "or record"
)


def named_in(section: str) -> list[str]:
    """The files and folders that a checklist names: the paths in its numbered items."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    _, _, text = text.partition(f"\n## {section}\n")
    items = re.findall(r"^\d\. (.*(?:\n   .*)*)", text.partition("\n## ")[0], re.MULTILINE)
    return [path for item in items for path in re.findall(r"`((?:\w+/)+[\w.]*)`", item)]


@pytest.mark.parametrize("section", TOYS)
def test_a_checklist_names_every_file_that_its_toy_takes(section: str) -> None:
    named = named_in(section)
    for file in TOYS[section]:
        folders = [f"{parent}/" for parent in Path(file).parents]
        ours = file in ("tests/test_counting.py", "tests/test_half_way.py")
        assert ours or file in named or {*folders} & {*named}, file
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.early
def test_what_the_checklists_name_is_enough(tmp_path: Path) -> None:
    for part in ("fusion_upcycle", "config", "hydra_plugins", "tests", "examples", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    for edits in TOYS.values():
        for file, edit in edits.items():
            path = tmp_path / file
            path.parent.mkdir(exist_ok=True)
            assert path.exists() != isinstance(edit, str), file
            path.write_text(edit if isinstance(edit, str) else edit(path.read_text("utf-8")))
    pytest_ = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-n0"]
    done = subprocess.run(
        [*pytest_, *CHECKS, "-k", CHOSEN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    for proven in ("flip_turns", "last_copies", "dots1", "counted", "compared"):
        assert proven in done.stdout, proven
