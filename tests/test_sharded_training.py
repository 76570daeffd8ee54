"""Parts of a model are trained, saved, gone on from and exported: gloo processes on the CPU."""

import copy
import io
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fusion_bench.modelpool import CausalLMPool
from processes import two_ranks
from safetensors.torch import load_file
from tiny import assert_same_bits, dense_model, load, tensors_of
from tiny_training import DATA, TOKENIZER, dying_in_a_save, moe_model, options_for, run
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_upcycle.checkpoint.moments import MOMENTS_FILE
from fusion_upcycle.errors import UpcyclingError
from fusion_upcycle.method import UpcycleAndTrainAlgorithm
from fusion_upcycle.training.checkpoint_folders import checkpoints_in
from fusion_upcycle.training.export import export
from fusion_upcycle.training.logs import read_metrics
from fusion_upcycle.training.module import PretrainingModule
from fusion_upcycle.training.options import TrainingOptions, make_training_options
from fusion_upcycle.training.saved import MOMENTS, WEIGHTS, SavedParts, _Unpickler
from fusion_upcycle.training.sharding import load_part
from fusion_upcycle.verify import verify_files

pytestmark = pytest.mark.filterwarnings("ignore:Routers out of balance")  # as tiny ones are

STEPS, SAVED = 6, 2  # a checkpoint after every second step
#: The family's selection bias is a parameter.
FAMILY = "ernie4_5_moe"
OPTIONS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "checkpoint_every": SAVED,
    "bias_update_rate": 0.001,
}
#: Of five batches, which two processes cannot share evenly.
OPTIONS |= {"validation": {"few": {"_target_": "tiny_training.documents", "count": 4}}}
FSDP = OPTIONS | {"strategy": "fsdp", "accelerator": "auto"}
EP = FSDP | {"expert_parallel": 2, "activation_checkpointing": True}
LARGEST_GATHERED = 4 * 32  # elements: a router, whose size says its learning rate


class Stop(Exception):
    """Of a run, at a step."""


def options_of(ranks: int, **options: Any) -> TrainingOptions:
    """Without what is of `train` itself."""
    own = {n: value for n, value in options.items() if n not in ("optimizer_state", "validation")}
    return make_training_options(**options_for(STEPS, devices=ranks, **own))


def train_part(model: Path, folder: Path, ranks: int, stop: int = STEPS, **options: Any) -> Any:
    """Train this process's part; up to a step, as if it was ended there."""
    part = load_part(model, options_of(ranks, **options))
    original = PretrainingModule.training_step

    def training_step(self: Any, batch: Any, index: int) -> None:
        if self.global_step == stop:
            self.trainer.checkpoint_callbacks[0]._finish()
            raise Stop
        original(self, batch, index)

    places = {} if stop < STEPS else {"output": folder / "out", "save_moments": True}
    with patch.object(PretrainingModule, "training_step", training_step):
        return run(part, folder, STEPS, devices=ranks, **options, **places)


def small(tensor: DTensor, *arguments: Any, **named: Any) -> torch.Tensor:
    assert tensor.numel() <= LARGEST_GATHERED, tensor.shape
    return FULL_TENSOR(tensor, *arguments, **named)


def synced(descriptor: int) -> None:
    SYNCED.add(os.fstat(descriptor).st_ino)
    FSYNC(descriptor)


FULL_TENSOR, FSYNC = DTensor.full_tensor, os.fsync
SYNCED: set[int] = set()


def first_two(model: Path, folder: Path) -> None:
    """Whole runs, and one that is killed while it saves."""
    nothing = patch("torch.distributed.checkpoint.state_dict._get_model_state_dict", None)
    with nothing, patch.object(DTensor, "full_tensor", small):
        trained = train_part(model, folder / "fsdp", 2, **FSDP)
        assert trained.record["class"] == "Ernie4_5_MoeForCausalLM"
        train_part(model, folder / "ep", 2, **EP)
        with pytest.raises(Stop), patch("os.fsync", synced):
            train_part(model, folder / "turns", 2, SAVED, **FSDP)
        (saved,) = checkpoints_in(folder / "turns" / "work" / "checkpoints")
        own = saved / "parts" / f"__{os.environ['RANK']}_0.distcp"
        assert own.stat().st_ino in SYNCED  # by the machine that wrote it
        for options in (FSDP, EP):
            assert_bfloat16(model, folder / f"bf16-{options.get('expert_parallel')}", options)
    assert_full_disks_are_told(model, folder)
    with dying_in_a_save(4):
        train_part(model, folder / "killed", 2, **FSDP)


def assert_full_disks_are_told(model: Path, folder: Path) -> None:
    """To all processes: none waits for one whose disk is full."""
    writes = "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data"
    for rank, call in (("0", "fusion_upcycle.training.run.describe"), ("1", writes)):
        error = OSError(28, "No space left on device") if rank == os.environ["RANK"] else None
        full = nullcontext() if error is None else patch(call, side_effect=error)
        with pytest.raises(UpcyclingError, match=r"Saving .*02 failed: .*No space left"), full:
            train_part(model, folder / f"full-{rank}", 2, **FSDP)
        assert not checkpoints_in(folder / f"full-{rank}" / "work" / "checkpoints")


def assert_bfloat16(model: Path, folder: Path, options: dict[str, Any]) -> None:
    """No matrix product of experts is in float32."""
    seen: set[torch.dtype] = set()

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if "grouped_mm" in str(func):
                seen.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Dispatch(), pytest.raises(Stop):
        train_part(model, folder, 2, 1, **options, precision="bf16-mixed")
    assert seen - {torch.int32} == {torch.bfloat16}


def second_two(model: Path, folder: Path) -> None:
    """Go on, in the same layout and in others."""
    train_part(model, folder / "killed", 2, **FSDP)
    with pytest.raises(Stop):
        train_part(model, folder / "turns", 2, 2 * SAVED, **EP)
    train_part(model, folder / "turns", 2, **FSDP)
    moments = {"optimizer_state": str(folder / "fsdp" / "out")}
    with pytest.raises(Stop):
        train_part(model, folder / "warm", 2, 2, **EP, **moments)
    chain(folder).run(CausalLMPool({"_pretrained_": str(folder / "dense")}, tokenizer=None))


def chain(folder: Path, **training: Any) -> UpcycleAndTrainAlgorithm:
    """A dense folder upcycled by one process, and trained by all."""
    method = "fusion_upcycle.method."
    upcycling = {"_target_": f"{method}SparseUpcyclingAlgorithm", "num_experts": 4}
    upcycling |= {"experts_per_token": 2, "expert_init": "noise", "verify": "none"}
    options = options_for(2, **FSDP | {"bias_update_rate": 0.0, "devices": 2})
    options |= {"_target_": f"{method}ContinuedPretrainingAlgorithm", "data": DATA}
    options |= {"tokenizer": str(folder / "dense"), "progress": False}
    options |= {"save_checkpoint": str(folder / "chain")}
    return UpcycleAndTrainAlgorithm(upcycling, options | training)


def one(model: Path, folder: Path) -> None:
    train_part(model, folder / "alone", 1, **FSDP)
    with pytest.raises(UpcyclingError, match=r"strategy=fsdp trains a model of a folder"):
        run(moe_model(FAMILY), folder / "live", 1, **FSDP)
    part = load_part(model, options_of(1, **FSDP))
    with pytest.raises(UpcyclingError, match=r"strategy=auto trains whole models.*fsdp"):
        run(part, folder / "live", 1, **OPTIONS)


def losses(folder: Path, *names: str) -> list[list[float]]:
    names = names or ("lm_nats_per_token", "balance", "z", "total")
    return [[row[name] for name in names] for row in read_metrics(folder / "log")]


def test_parts_of_a_model_are_trained(tmp_path: Path) -> None:
    """One test, as what the processes make is looked at from all sides."""
    source = tmp_path / "model"
    model = moe_model(FAMILY)
    model.save_pretrained(source)
    two_ranks(first_two, source, tmp_path, folder=tmp_path, code=9)
    parts = checkpoints_in(tmp_path / "turns" / "work" / "checkpoints")[-1]
    shutil.copytree(tmp_path / "turns", tmp_path / "alone")
    assert_balanced(parts)
    assert_exported(parts, tmp_path / "exported")
    with pytest.raises(UpcyclingError, match="sharded was True, is False"):
        run(model, tmp_path / "turns", STEPS, **OPTIONS)
    dense_model("llama", vocab_size=257).bfloat16().save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    two_ranks(second_two, source, tmp_path, folder=tmp_path)
    two_ranks(one, source, tmp_path, folder=tmp_path, ranks=1)

    model_again = copy.deepcopy(model)
    whole = run(model, tmp_path / "whole", STEPS, **OPTIONS).record["validation"][STEPS]["few"]
    fsdp, ep = tmp_path / "fsdp", tmp_path / "ep"
    for folder in (fsdp, ep, tmp_path / "turns", tmp_path / "alone"):
        record = json.loads((folder / "out" / "training.json").read_text())
        assert record["steps"] == len(losses(folder)) == STEPS
        assert record["validation"][str(STEPS)]["few"] == pytest.approx(whole, rel=1e-5)
        assert verify_files(folder / "out", progress=False) > 5
        for found, expected in zip(losses(folder), losses(tmp_path / "whole"), strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for name in ("gradient_norm", "churn"):
            pairs = zip(losses(folder, name), losses(tmp_path / "whole", name), strict=True)
            assert all(a == pytest.approx(b, rel=1e-5) for a, b in pairs)
    for name, bias in tensors_of(ep / "out").items():
        if "correction_bias" in name:
            assert torch.equal(bias, tensors_of(fsdp / "out")[name])
    names = ("step", "lm_nats_per_token", "total", "gradient_norm", "churn", "layer_1/load_0")
    assert losses(tmp_path / "killed", *names) == losses(fsdp, *names)
    warm = {"optimizer_state": str(fsdp / "out")}
    run(model_again, tmp_path / "warm whole", STEPS, **OPTIONS, **warm)
    pairs = zip(losses(tmp_path / "warm"), losses(tmp_path / "warm whole")[:2], strict=True)
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in pairs)
    record = json.loads((tmp_path / "chain" / "training.json").read_text())
    assert record["source"]["name"] == str(tmp_path / "chain.training" / "upcycled")
    assert record["source"]["upcycling"]["num_experts"] == 4
    assert load(tmp_path / "chain").config.num_local_experts == 4
    assert {t.dtype for t in tensors_of(tmp_path / "chain").values()} == {torch.bfloat16}
    killed = tmp_path / "killed" / "out"
    assert_same_bits(tensors_of(killed), tensors_of(fsdp / "out"))
    assert_same_bits(load_file(killed / MOMENTS_FILE), load_file(fsdp / "out" / MOMENTS_FILE))
    record = json.loads((killed / "training.json").read_text())
    assert record["resumed_from"] == "step-000000002"


def assert_balanced(checkpoint: Path) -> None:
    sizes = [path.stat().st_size for path in (checkpoint / "parts").glob("__*")]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)


def assert_exported(checkpoint: Path, output: Path) -> None:
    """By one process, to the bit, from what two have saved."""
    part = checkpoint / "parts" / "__1_0.distcp"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UpcyclingError, match=r"is damaged \(parts/__1_0\.distcp differs\)"):
        export(checkpoint, output)
    part.write_bytes(whole)
    export(checkpoint, output, moments=True)
    saved, found = SavedParts(checkpoint), tensors_of(output)
    experts = "model.layers.1.mlp.experts"
    packed = saved.tensor(f"{WEIGHTS}{experts}.gate_up_proj")
    for expert, both in enumerate(packed):
        gate, up = both.chunk(2)
        assert torch.equal(found[f"{experts}.{expert}.gate_proj.weight"], gate)
        assert torch.equal(found[f"{experts}.{expert}.up_proj.weight"], up)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(found[embeddings], saved.tensor(WEIGHTS + embeddings))
    moments = load_file(output / MOMENTS_FILE)
    assert {MOMENTS + name for name in moments} == {n for n in saved.specs if MOMENTS in n}
    name = f"{experts}.down_proj/exp_avg"
    assert torch.equal(moments[name], saved.tensor(MOMENTS + name))
    assert json.loads((output / "training.json").read_text())["steps"] == SAVED
    assert verify_files(output, progress=False) > 5


def test_metadata_that_names_code_is_not_read() -> None:
    for hostile in (os.system, eval, torch.load, getattr):
        with pytest.raises(pickle.UnpicklingError, match="no place"):
            _Unpickler(io.BytesIO(pickle.dumps(hostile))).load()


def test_what_is_no_checkpoint_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UpcyclingError, match="is no checkpoint of a training"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_parallel": 2}, r"expert_parallel=2 .*strategy=auto cannot.*fsdp"),
        ({"strategy": "fsdp", "compile": True}, "compile with strategy=fsdp"),
        ({"expert_parallel": 0}, "expert_parallel"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UpcyclingError, match=words):
        make_training_options(tokens=10**6, **options)
