"""What `convert.py` measures, one job a process: `python jobs.py NAME JSON_ARGUMENTS`.

A job prints one JSON line with what only it can know; wall, CPU and memory of the process are
measured from outside.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PIECE_BYTES = 8 * 2**20
CALIBRATION_TOKENS = 1024


def make_source(
    folder: str, config: dict[str, int], seed: int = 0, family: str = "llama"
) -> dict[str, Any]:
    """A random bfloat16 model in three shards with a byte-level tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fusion_upcycle.demo.tokenizer import byte_tokenizer

    torch.manual_seed(seed)
    made = AutoConfig.for_model(family, **config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    partial = Path(f"{folder}.partial")
    model.save_pretrained(partial, max_shard_size=model.num_parameters() * 2 * 4 // 11)
    byte_tokenizer(config["max_position_embeddings"]).save_pretrained(partial)
    partial.rename(folder)
    return {}


def plain_write(output: str, nbytes: int, give_back: bool = False) -> dict[str, Any]:
    """The floor: the same number of bytes in sequence, and on the disk at the end.

    With `give_back` the file's pages leave the page cache as they reach the disk, as our writer
    does it: on a virtual machine whose memory is backed on first use, fresh pages cost more than
    the writing.
    """
    piece = memoryview(os.urandom(PIECE_BYTES))
    Path(output).mkdir()
    descriptor = os.open(f"{output}/bytes", os.O_CREAT | os.O_WRONLY)
    left = nbytes
    while left:
        left -= os.write(descriptor, piece[:left])
        if give_back:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.fdatasync(descriptor)
    os.close(descriptor)
    return {}


def fusion_upcycle(source: str, output: str, num_experts: int) -> dict[str, Any]:
    """Our conversion with verify=layers, split into imports, plan to rename, and proof."""
    started, cpu_started = time.perf_counter(), time.process_time()
    from fusion_upcycle.cli import let_threads_sleep

    let_threads_sleep()  # as the command line does
    # transformers imports these on first use, in the middle of planning.
    from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401

    from fusion_upcycle import upcycle

    imported, cpu_imported = time.perf_counter(), time.process_time()
    made = upcycle(
        source,
        output,
        num_experts=num_experts,
        experts_per_token=2,
        verify="layers",
        progress=False,
    )
    ended, cpu_ended = time.perf_counter(), time.process_time()
    assert made.proof.holds
    proof, write = made.costs["prove"], made.costs["write"]
    return {
        "imports": {"wall": imported - started, "cpu": cpu_imported - cpu_started},
        "conversion": {
            "wall": ended - imported - proof["wall_seconds"],
            "cpu": cpu_ended - cpu_imported - proof["cpu_seconds"],
            "peak_rss": write["peak_rss_bytes"],
        },
        "proof": {"wall": proof["wall_seconds"], "cpu": proof["cpu_seconds"]},
    }


def merge(models: dict[str, str], output: str, router_init: str) -> dict[str, Any]:
    """Our merge with verify=layers; calibration on a few of the demo's texts."""
    from fusion_upcycle import merge_into_moe

    texts = {"_target_": "fusion_upcycle.demo.domain_text", "split": "validation"}
    domains = ("prose", "source", "arithmetic", "prose")
    calibrated = router_init == "prototype"
    made = merge_into_moe(
        models,
        output,
        router_init=router_init,
        calibration={n: texts | {"domain": d} for n, d in zip(models, domains, strict=True)}
        if calibrated
        else None,
        calibration_tokens=CALIBRATION_TOKENS,
        verify="layers",
        progress=False,
    )
    return {
        "proof": {"wall": made.costs["prove"]["wall_seconds"]},
        "conversion": {
            "wall": made.costs["write"]["wall_seconds"],
            "peak_rss": made.costs["write"]["peak_rss_bytes"],
        },
        "parameters": made.record["parameters"],
        "proven": made.record["proof_in_words"],
    }


def expand(
    source: str, output: str, tokens: int, options: dict[str, Any], moments: bool = False
) -> dict[str, Any]:
    """Our expansion to twice the experts with verify=layers; calibration on the demo's text."""
    from fusion_upcycle import expand
    from fusion_upcycle.demo.texts import demo_documents

    made = expand(
        source,
        output,
        multiplier=2,
        calibration=demo_documents("train") if options["router_extension"] != "copy" else None,
        calibration_tokens=tokens,
        context_length=256,
        optimizer_state=source if moments else None,
        verify="layers",
        progress=False,
        **options,
    )
    return {
        "proof": made.costs["prove"],
        "write": made.costs["write"],
        "parameters": made.record["parameters"],
        "proven": made.record["proof_in_words"],
    }


def make_moments(folder: str) -> dict[str, Any]:
    """AdamW's moments of a folder, in float32, beside its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from fusion_upcycle.checkpoint.moments import write_moments

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moments = {
        name: {"exp_avg": p.detach(), "exp_avg_sq": p.detach().square(), "step": torch.tensor(9.0)}
        for name, p in model.named_parameters()
    }
    write_moments(moments, Path(folder))
    return {}


def make_hollow(folder: str, layers: int, shards: int, num_experts: int | None) -> dict[str, Any]:
    """A Llama, or a Mixtral, whose files have headers and no data: all zeros, and no disk."""
    from transformers import LlamaConfig, MixtralConfig

    from fusion_upcycle.architectures.layout import file_layout
    from fusion_upcycle.checkpoint.weight_files import INDEX_FILE
    from fusion_upcycle.checkpoint.writer import Shard

    shape = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "dtype": "bfloat16",
    }
    config: Any = (
        LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
        if num_experts is None
        else MixtralConfig(
            **shape, num_local_experts=num_experts, architectures=["MixtralForCausalLM"]
        )
    )
    config.save_pretrained(folder)
    specs = file_layout(config).specs
    names = list(specs)
    weight_map = {}
    for number in range(shards):
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        shard = Shard(file, {name: specs[name] for name in mine})
        path = Path(folder, file)
        path.write_bytes(shard.header)
        os.truncate(path, shard.nbytes)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    Path(folder, INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return {}


def plan(source: str, num_experts: int | None, multiplier: int | None) -> dict[str, Any]:
    """An upcycling or an expansion up to where the writing would begin."""
    import torch
    from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401

    from fusion_upcycle.checkpoint.reader import CheckpointReader
    from fusion_upcycle.checkpoint.source import read_config
    from fusion_upcycle.checkpoint.writer import plan_shards
    from fusion_upcycle.expansion.options import make_expansion_options
    from fusion_upcycle.expansion.plan import plan_expansion
    from fusion_upcycle.report.memory import peak_bytes, reset_peak
    from fusion_upcycle.report.record import Measured
    from fusion_upcycle.upcycling.options import make_options
    from fusion_upcycle.upcycling.plan import plan_upcycling

    cpu = torch.device("cpu")
    reset_peak(cpu)
    imported = peak_bytes(cpu)
    with Measured() as planning:
        reader, config = CheckpointReader(Path(source)), read_config(Path(source))
        conversion = (
            plan_upcycling(reader, config, make_options(num_experts=num_experts))
            if multiplier is None
            else plan_expansion(reader, config, make_expansion_options(multiplier=multiplier))
        )
        headers = [shard.header for shard in plan_shards(conversion.specs, "5GB")]
        record = json.dumps(conversion.record({"source": {}}))
    measured = planning.as_record()
    assert headers and record
    return {
        "shards": len(reader.files),
        "tensors": len(reader.specs),
        "planned": len(conversion.specs),
        "wall": measured["wall_seconds"],
        "cpu": measured["cpu_seconds"],
        "peak_bytes": peak_bytes(cpu) - imported,
    }


def in_memory(source: str, output: str, num_experts: int) -> dict[str, Any]:
    """The obvious way with transformers alone: build the MoE, copy weights, save."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    shared = [
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ]
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in shared},
        num_local_experts=num_experts,
        num_experts_per_tok=2,
    )
    moe = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        moe.load_state_dict(
            {name: t for name, t in dense.state_dict().items() if ".mlp." not in name},
            strict=False,
        )
        for ours, theirs in zip(dense.model.layers, moe.model.layers, strict=True):
            gate_up = torch.cat([ours.mlp.gate_proj.weight, ours.mlp.up_proj.weight])
            theirs.mlp.experts.gate_up_proj.copy_(gate_up)  # to each expert
            theirs.mlp.experts.down_proj.copy_(ours.mlp.down_proj.weight)
    moe.save_pretrained(output)
    return {}


def main(name: str, arguments: str) -> None:
    jobs = (
        *(make_source, make_moments, make_hollow),
        *(plain_write, fusion_upcycle, merge, expand, plan, in_memory),
    )
    job = {function.__name__: function for function in jobs}
    print(json.dumps(job[name](**json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
