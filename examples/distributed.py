"""Does training in parts hold what it says: memory, balance, the same numbers in every layout?

Question: what do processes hold of a model that they load, train, save and export in parts; do all
          layouts (FSDP2, expert parallelism, both) load the files' bits and train alike?
Command:  python examples/distributed.py --record examples/results/distributed
Needs:    two cores, 12 GB of memory, 12 GB of disk, 15 minutes. Gloo on the CPU; no GPU was seen.
Expected: every line of the record's `checks` is true. --tiny: 2 minutes, without what memory is
          measured.

Each measurement is a run of torchrun of its own, of this file with `--role`; each process writes
what it saw to a folder, and the first process here judges.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # tiny models, in the roles

MIB = 2**20
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_5_moe_text",
    "olmoe",
    "granitemoe",
    "flex_olmo",
    "ernie4_5_moe",
    "glm4_moe",
    "deepseek_v3",
    "cohere2_moe",
    "lfm2_moe",
    "hunyuan_v1_moe",
]
OWN = ["gemma2", "gpt_neox", "vit", "t5"]
#: Processes and processes of an expert's group: FSDP2, the last axis, EP, both.
LAYOUTS = {"fsdp": (2, 1), "last axis": (8, 1), "ep 2": (2, 2), "ep 2 and last axis": (4, 2)}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "layers": 5, "experts": 8, "vocab": 16000}
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--tiny", action="store_true", help="without the model of 220M parameters")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, folder, *arguments = options.role
        globals()[f"role_{role}"](Path(folder), *arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        record = measured(Path(temporary), tiny=options.tiny)
    print(json.dumps(record, indent=2))
    if options.record:
        options.record.mkdir(parents=True, exist_ok=True)
        path = options.record / "distributed.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not all(record["checks"].values()):
        sys.exit("Not all checks are true.")


def measured(folder: Path, *, tiny: bool) -> dict[str, Any]:
    from fusion_upcycle.report.record import versions

    record: dict[str, Any] = {"versions": versions()}
    checks: dict[str, bool] = {}
    launch(1, "models", folder)
    loads = [each for n in (2, 4, 8) for each in launch(n, "layouts", folder)[0]["loads"]]
    record["loads"] = loads
    checks["tensors bitwise"] = all(each["tensors_equal"] for each in loads)
    checks["logits bitwise, with EP within 1e-6 of the largest"] = all(
        each["logits"] <= (1e-6 if each["expert_parallel"] > 1 else 0.0) for each in loads
    )
    runs = {
        "fsdp 2": (2, "fsdp 2", {}),
        "fsdp 1": (1, "fsdp 1", {}),
        "ep 2": (2, "ep 2", {"expert_parallel": 2}),
        "killed in step 5, then 2": (2, "killed", {}),
        "2, then 1": (1, "to 1", {}),
        "2, then 4": (4, "to 4", {}),
        "fsdp 2, then ep 2": (2, "to ep", {"expert_parallel": 2}),
        "ep 2, then fsdp 2": (2, "from ep", {}),
    }
    launch(2, "killed", folder, "killed", "{}", code=1)
    launch(2, "killed", folder, "from ep", '{"expert_parallel": 2}', code=1)
    for name in ("to 1", "to 4", "to ep"):
        subprocess.run(["cp", "-r", folder / "killed", folder / name], check=True)
    record["runs"] = {
        name: launch(ranks, "train", folder, work, json.dumps(given))[0]
        for name, (ranks, work, given) in runs.items()
    }
    expected = record["runs"]["fsdp 2"]
    for name, run in record["runs"].items():
        run["loss_off"], run["norm_off"] = (off(run, expected, of) for of in ("losses", "norms"))
        checks[f"{name}: losses within 1e-6, norms 1e-5, biases equal"] = (
            run["loss_off"] <= 1e-6
            and run["norm_off"] <= 1e-5
            and run["biases"] == expected["biases"]
        )
    again = record["runs"]["killed in step 5, then 2"]
    checks["killed and resumed: bitwise"] = again["sha256"] == expected["sha256"]
    if not tiny:
        record["memory"] = memory(folder, checks)
    return record | {"checks": checks}


def off(run: dict[str, Any], expected: dict[str, Any], what: str) -> float:
    """The largest relative difference."""
    pairs = zip(run[what], expected[what], strict=True)
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def memory(folder: Path, checks: dict[str, bool]) -> dict[str, Any]:
    launch(1, "large", folder)
    found: dict[str, Any] = {}
    found["load"] = load = launch(2, "load_large", folder)
    bound = load[0]["model_mib"] / 2 + 2 * load[0]["largest_mib"] + 150
    checks[f"load: at most {bound:.0f} MiB each"] = max(p["peak_mib"] for p in load) <= bound
    found["train"] = train = launch(2, "train_large", folder)
    # Weights, gradients and two moments, and while it saves a copy of all but the gradients.
    bound = (4 + 3) * load[0]["model_mib"] / 2 + 400
    checks[f"training and saving: at most {bound:.0f} MiB each"] = (
        max(p["saving_peak_mib"] for p in train) <= bound
    )
    sizes = train[0]["files_mib"]
    checks["files of processes within 10 %"] = max(sizes) <= 1.1 * min(sizes)
    found["export"] = export = launch(1, "export_large", folder)[0]
    bound = 2 * load[0]["largest_mib"] + 100
    checks[f"export: at most {bound:.0f} MiB"] = export["peak_mib"] <= bound
    checks["export: bitwise"] = export["equal"]
    found["balance"] = [p["local"] for p in launch(4, "balance", folder)]
    mean = sum(found["balance"]) / len(found["balance"])
    checks["4 processes, 2 experts: within 1.05 of the mean"] = max(found["balance"]) <= 1.05 * mean
    return found


def launch(ranks: int, role: str, folder: Path, *arguments: str, code: int = 0) -> list[Any]:
    """What each process of a role has written."""
    for old in folder.glob("seen-*.json"):
        old.unlink()
    print(f"{ranks} x {role} {' '.join(arguments)}", file=sys.stderr, flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}", __file__, "--role", role, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        sys.exit(f"{role} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    seen = sorted(folder.glob("seen-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in seen]


def saw(folder: Path, value: Any) -> None:
    rank = os.environ["RANK"]
    (folder / f"seen-{rank}.json").write_text(json.dumps(value), encoding="utf-8")


# --- roles ----------------------------------------------------------------------------------------


def role_models(folder: Path) -> None:
    """Tiny models of every family, and of our own."""
    import tiny_families
    import tiny_moe
    import tiny_training

    from fusion_upcycle import upcycle

    for name in FAMILIES:
        tiny_moe.moe_folder(folder / "families" / name, name)
    for name in OWN:
        dense, output = folder / f"dense-{name}", folder / "families" / f"own {name}"
        tiny_families.dense(name).float().save_pretrained(dense)
        how: dict[str, Any] = {"verify": "none", "progress": False, "expert_init": "noise"}
        upcycle(dense, output, num_experts=4, target="sparse", **how)
    tiny_training.moe_model("ernie4_5_moe").save_pretrained(folder / "trained")


def role_layouts(folder: Path) -> None:
    import torch

    from fusion_upcycle.live.loading import load_by_config
    from fusion_upcycle.live.tensors import whole
    from fusion_upcycle.training import launching
    from fusion_upcycle.training.part_layout import plan_layout
    from fusion_upcycle.training.sharding import config_of, load_sharded

    processes = int(os.environ["WORLD_SIZE"])
    launching.start(processes, 1, "auto")
    loads = []
    for path in sorted((folder / "families").iterdir()):
        expected = load_by_config(path, dtype=torch.float32)
        given = inputs(expected)
        for name, (ranks, expert_parallel) in LAYOUTS.items():
            own = path.name.startswith("own")
            # Experts with biases, as GPT-NeoX's and ViT's, are refused on the last axis.
            if ranks != processes or (own and (expert_parallel > 1 or processes > 4)):
                continue
            layout = plan_layout(config_of(path), processes, expert_parallel)
            found = load_sharded(path, layout, dtype=torch.float32).model
            state, wanted = found.state_dict(), expected.state_dict()
            equal = all(torch.equal(whole(state[n]), wanted[n]) for n in wanted)
            with torch.no_grad():
                logits = expected(**given).logits
                difference = (found(**given).logits - logits) / logits.abs().max()
            loads.append(
                {
                    "family": path.name,
                    "layout": name,
                    "processes": processes,
                    "expert_parallel": expert_parallel,
                    "axis": layout.axis,
                    "tensors_equal": equal,
                    "logits": float(difference.abs().max()),
                }
            )
    saw(folder, {"loads": loads})


def inputs(model: Any) -> dict[str, Any]:
    import torch

    drawn = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=drawn)}
    ids = torch.randint(3, 60, (2, 16), generator=drawn)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def trained(folder: Path, work: Path, model: Path, steps: int, **options: Any) -> Any:
    import tiny_training

    from fusion_upcycle.training.options import make_training_options
    from fusion_upcycle.training.sharding import load_part

    given: dict[str, Any] = {
        "strategy": "fsdp",
        "devices": int(os.environ["WORLD_SIZE"]),
        "accelerator": "auto",
        "learning_rate": 3e-3,
        "checkpoint_every": 2,
    } | options
    output = given.pop("output", None)
    part = load_part(model, make_training_options(**tiny_training.options_for(steps, **given)))
    return tiny_training.run(part, work, steps, output=output, **given)


def role_killed(folder: Path, work: str, options: str) -> None:
    """The process ends while it saves step 4."""
    import tiny_training

    with tiny_training.dying_in_a_save(4):
        role_train(folder, work, options)


def role_train(folder: Path, work: str, options: str) -> None:
    from safetensors.torch import load_file

    from fusion_upcycle.checkpoint.digests import digest
    from fusion_upcycle.training.logs import read_metrics

    output = folder / work / "out"
    given = {"bias_update_rate": 0.001, "output": output} | json.loads(options)
    record = trained(folder, folder / work, folder / "trained", STEPS, **given).record
    rows = read_metrics(folder / work / "log")
    weights = load_file(output / "model.safetensors")
    saw(
        folder,
        {
            "resumed_from": record["resumed_from"],
            "losses": [row["lm_nats_per_token"] for row in rows],
            "norms": [row["gradient_norm"] for row in rows],
            "biases": {n: t.tolist() for n, t in weights.items() if "correction_bias" in n},
            "sha256": digest(output / "model.safetensors"),
            "cpu_seconds": record["cost"]["cpu_seconds"],
        },
    )


# --- memory ---------------------------------------------------------------------------------------


class Peak:
    """Largest anonymous memory in a block, beyond what there was before, looked at every 4 ms."""

    def __enter__(self) -> "Peak":
        self._before = self.highest = anonymous()
        self._ended = False
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._ended:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.004)

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._watch.join()

    @property
    def mib(self) -> float:
        return (self.highest - self._before) / MIB


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        rows = dict(line.split(":", 1) for line in lines)
    return sum(int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def role_large(folder: Path) -> None:
    """About 220M parameters, and a model of two experts."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    for name, experts, layers in (("large", LARGE["experts"], LARGE["layers"]), ("two", 2, 1)):
        config = MixtralConfig(
            vocab_size=LARGE["vocab"],
            hidden_size=LARGE["hidden_size"],
            intermediate_size=LARGE["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=12,
            num_key_value_heads=4,
            num_local_experts=experts,
            max_position_embeddings=128,
            pad_token_id=0,
        )
        MixtralForCausalLM(config).save_pretrained(folder / name)


def loaded(folder: Path) -> Any:
    import torch
    import torch.distributed.checkpoint  # its import is not the load's

    from fusion_upcycle.training import launching
    from fusion_upcycle.training.part_layout import plan_layout
    from fusion_upcycle.training.sharding import config_of, load_sharded

    processes = int(os.environ["WORLD_SIZE"])
    launching.start(processes, 1, "auto")
    layout = plan_layout(config_of(folder), processes)
    with Peak() as peak:
        model = load_sharded(folder, layout, dtype=torch.float32).model
    return model, peak


def role_load_large(folder: Path) -> None:
    model, peak = loaded(folder / "large")
    sizes = [parameter.numel() * 4 / MIB for parameter in model.parameters()]
    saw(folder, {"model_mib": sum(sizes), "largest_mib": max(sizes), "peak_mib": peak.mib})


def role_balance(folder: Path) -> None:
    model, _ = loaded(folder / "two")
    saw(folder, {"local": sum(p.to_local().numel() for p in model.parameters())})


def role_train_large(folder: Path) -> None:
    """Two steps without saving, then one that is saved at its end."""

    from fusion_upcycle.training.checkpoints import CheckpointEvery

    save, peaks = CheckpointEvery._save, {}

    def saving(self: Any, trainer: Any) -> None:
        peaks["training"] = whole_run.mib
        save(self, trainer)

    CheckpointEvery._save = saving  # type: ignore[method-assign]
    with Peak() as whole_run:
        trained(folder, folder / "run", folder / "large", 3, checkpoint_every=3)
    (parts,) = (folder / "run" / "work" / "checkpoints").glob("step-*/parts")
    saw(
        folder,
        {
            "training_peak_mib": peaks["training"],
            "saving_peak_mib": whole_run.mib,
            "files_mib": [path.stat().st_size / MIB for path in sorted(parts.glob("__*"))],
        },
    )


def role_export_large(folder: Path) -> None:
    import torch
    from safetensors import safe_open

    from fusion_upcycle.training.export import export
    from fusion_upcycle.training.saved import WEIGHTS, SavedParts

    (checkpoint,) = (folder / "run" / "work" / "checkpoints").glob("step-*")
    began = time.perf_counter()
    with Peak() as peak:
        export(checkpoint, folder / "exported")
    seconds = time.perf_counter() - began
    saved, equal = SavedParts(checkpoint), True
    with safe_open(folder / "exported" / "model.safetensors", "pt") as file:
        for layer in range(LARGE["layers"]):
            experts = f"model.layers.{layer}.block_sparse_moe.experts"
            packed = saved.tensor(f"{WEIGHTS}model.layers.{layer}.mlp.experts.gate_up_proj")
            for expert, both in enumerate(packed):
                for name, part in zip(("w1", "w3"), both.chunk(2), strict=True):
                    found = file.get_tensor(f"{experts}.{expert}.{name}.weight")
                    equal &= torch.equal(found, part)
            down = saved.tensor(f"{WEIGHTS}model.layers.{layer}.mlp.experts.down_proj")
            for expert, part in enumerate(down):
                found = file.get_tensor(f"{experts}.{expert}.w2.weight")
                equal &= torch.equal(found, part)
    saw(folder, {"peak_mib": peak.mib, "seconds": seconds, "equal": equal})


if __name__ == "__main__":
    main()
