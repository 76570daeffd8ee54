"""Made-up records of a benchmark, as the runner leaves them."""

import json
from pathlib import Path
from typing import Any

TASKS = ("prose", "source", "arithmetic")


def record(
    folder: Path,
    row: str,
    scores: dict[str, float] | None,
    *,
    metric: str = "bits_per_byte",
    better: str | None = "lower",
    stderr: float | None = None,
    cost: dict[str, float] | None = None,
    routing: dict[str, float] | None = None,
    unseen: tuple[str, ...] = (),
    method: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """`run_record.json` of one run; without scores it failed."""
    report: dict[str, Any] = {"quality": {}}
    for task, value in (scores or {}).items():
        report["quality"][task] = {metric: value}
        if stderr is not None:
            report["quality"][task][f"{metric}_stderr"] = stderr
    if cost is not None:
        report["cost"] = {"cost": cost, "model_info": {"all_params": 1}}
    if routing is not None:
        report["routing"] = {"routing": routing}
    section = {
        "experiment": "made_up",
        "position": 0,
        "status": "done" if scores else "failed",
        "error": None if scores else "RuntimeError: it broke",
        "purpose": "test",
        "row": row,
        "settings": {},
        "group": "Model Merging",
        "reference": None,
        "models": list(TASKS),
        "subset": False,
        "seed": 0,
        "trials": 0,
        "tasks": {"quality": {"metric": metric, "better": better, "unseen": list(unseen)}},
        "config_hash": "h",
        "arguments": ["method=dummy", "modelpool.models={a: 'x y'}"],
        "costs": {"wall_seconds": 2.0},
        "report": report if scores else {},
        **facts,
    }
    folder.mkdir(parents=True)
    content = {"schema": 1, "benchmark": section, **({"method": method} if method else {})}
    path = folder / "run_record.json"
    path.write_text(json.dumps(content))
    return path


def of(*values: float) -> dict[str, float]:
    """Scores on all tasks."""
    return dict(zip(TASKS, values, strict=True))


def experiment(root: Path) -> Path:
    """Everything that a report shows: references, seeds, trials, subsets, cost, a failure."""
    base = {"reference": "pretrained", "group": "Reference Results", "models": []}
    record(root / "base", "Pre-trained", of(2.5, 2.2, 1.4), **base)
    for place, values in enumerate(((2.4, 2.3, 1.5), (2.6, 2.1, 1.6), (2.8, 2.4, 1.3))):
        name = TASKS[place]
        tuned = {"reference": "finetuned", "group": "Reference Results", "models": [name]}
        record(root / name, f"Fine-tuned ({name})", of(*values), position=place + 1, **tuned)
    cost = {"total_parameters": 1e5, "active_parameters": 1e5, "flops_per_token": 2e5}
    record(root / "average", "Simple Average", of(2.45, 2.25, 1.45), position=4, cost=cost)
    tried = {"settings": {"scaling_factor": 0.3}, "trials": 12, "position": 5}
    record(root / "ta", "Task Arithmetic", of(2.44, 2.15, 1.35), cost=cost, **tried)
    moe = {"group": "Model Mixing", "position": 6}
    larger = {"total_parameters": 4e5, "active_parameters": 1.5e5, "flops_per_token": 3e5}
    used = {"load_cv": 0.1, "dead_experts": 1, "experts": 8, "entropy_bits": 1.5}
    proof = {"proof": {"holds": True, "function": {"max_abs": 1e-6}}}
    for seed, shift in enumerate((0.0, 0.02)):
        scores = of(2.3 + shift, 2.0 + shift, 1.2 + shift)
        where = root / f"moe_{seed}"
        record(where, "MoE", scores, seed=seed, cost=larger, routing=used, method=proof, **moe)
    for pair, values in {
        ("prose", "source"): (2.42, 2.15, 1.55),
        ("prose", "arithmetic"): (2.6, 2.4, 1.6),
    }.items():
        names = {"models": list(pair), "subset": True, "position": 7}
        record(root / "+".join(pair), "SLERP", of(*values), **names)
    record(root / "trial", "Task Arithmetic", of(0.1, 0.1, 0.1), purpose="trial")
    record(root / "broken", "Broken <b>&", None, position=8)
    return root
