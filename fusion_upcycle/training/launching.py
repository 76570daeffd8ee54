"""The processes of a sharded run: started by torchrun, and found before a model is loaded."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from fusion_upcycle.errors import UpcyclingError, setting

#: Loading and exporting a large model keeps the others waiting.
_TIMEOUT = timedelta(hours=2)


def start(devices: int, num_nodes: int, accelerator: str) -> None:
    """Let this process find the others; one alone needs none.

    Raises:
        UpcyclingError: they were not started by torchrun, or there are not as many as was said.
    """
    import torch.distributed as dist

    processes = devices * num_nodes
    require_as_started(devices, num_nodes)
    given = os.environ.get("WORLD_SIZE")
    if given is None and processes > 1:
        nodes = f" --nnodes {num_nodes}" if num_nodes > 1 else ""
        raise UpcyclingError(
            f"strategy=fsdp on {processes} devices needs a process for each before the model is "
            f"loaded. Start it with torchrun{nodes} --nproc-per-node {devices}, followed by -m and "
            "the rest of the command."
        )
    found = torch.accelerator.current_accelerator()
    if accelerator == "cpu" and found is not None:
        raise UpcyclingError(
            f"accelerator=cpu with strategy=fsdp, where transformers would load onto {found.type}: "
            "hide the devices (CUDA_VISIBLE_DEVICES=), or leave accelerator out."
        )
    if dist.is_initialized():
        return
    if found is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    # Checkpoints are written from the CPU, beside the training.
    backend = "gloo" if found is None else f"cpu:gloo,{found.type}:nccl"
    if given is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    atexit.register(_end)


def require_as_started(devices: int, num_nodes: int) -> None:
    """Refuse other processes than were said: each would train by itself, all in one folder.

    Raises:
        UpcyclingError: torchrun or FusionBench's fabric has started others.
    """
    given = os.environ.get("WORLD_SIZE")
    if given is None:
        return
    each = int(os.environ.get("LOCAL_WORLD_SIZE") or int(given) // num_nodes or 1)
    asked = {"devices": (devices, each), "num_nodes": (num_nodes, int(given) // each)}
    other = [setting(name, found) for name, (said, found) in asked.items() if said != found]
    if other:
        raise UpcyclingError(
            f"{given} processes were started, {each} on this machine, but devices={devices} and "
            f"num_nodes={num_nodes}. Pass {' '.join(other)}, or start "
            f"{devices} on each of {num_nodes}."
        )


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process of each machine goes through the block before the others do."""
    import torch.distributed as dist

    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        if first:  # also where it failed, as the others will
            dist.barrier()


def _end() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
