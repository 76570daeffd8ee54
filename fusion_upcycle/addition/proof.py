"""The proof of an added expert: the model within the result, and the new expert by itself.

Details of the proof, beside the common fields:

- `kept`: how many tensors of the model stand in the result bit for bit: all but its routers.
- `experts`: the new model's experts in a MoE that chooses nothing else, against the dense model
  with its FFNs and what the result shares.
- `sources`: distance of the result's outputs from those of the model and of the new one.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch

from fusion_upcycle.checkpoint.tensors import TensorSource, aligned
from fusion_upcycle.errors import ProofError
from fusion_upcycle.merging.proof import distances, distances_in_words
from fusion_upcycle.report.progress import progress_bar
from fusion_upcycle.upcycling.proof import compare_streamed, streamed_dense
from fusion_upcycle.verification.function import Models, Sample
from fusion_upcycle.verification.proof import Findings, require_exact
from fusion_upcycle.verification.streamed_model import streamed_model
from fusion_upcycle.verification.tensors import same_bits

if TYPE_CHECKING:
    from fusion_upcycle.addition.addition import Addition


def prove_addition(
    addition: "Addition",
    result: TensorSource,
    *,
    mode: str,
    sample: Sample,
    models: Models,
    progress: bool = False,
) -> Findings:
    """Find the model within the result, and prove the new expert.

    Raises:
        ProofError: a tensor of the model is not in the result, or the new model's experts are not
            its FFNs.
    """
    kept = check_kept(addition, result, progress=progress)
    added = addition.added
    found, layers = compare_streamed(
        addition,
        result,
        sample.inputs,
        reference=addition.as_dense(added),
        expert=addition.first_expert(added),
        progress=progress,
    )
    require_exact(found, layers)
    new, moe_config = addition.models[added], addition.moe_config
    family = addition.architecture.for_config(moe_config)
    compute = torch.promote_types(addition.dtype, torch.float32)
    before = {
        "model": (
            moe_config,
            partial(streamed_model, moe_config, addition.moe, family, None, compute),
        ),
        added: (new.config, partial(streamed_dense, addition, new.source, new.config)),
    }
    sources = distances(addition, result, before, sample, models if mode == "logits" else None)
    return Findings(
        f"the {kept} tensors of the model but its routers are the result's, bit for bit, and the "
        f"new expert is {added}'s FFN, proven; distance from the model and the new one: "
        + distances_in_words(sources),
        details={"kept": kept, "experts": {added: found.to_json()}, "sources": sources},
    )


def check_kept(addition: "Addition", result: TensorSource, *, progress: bool = False) -> int:
    """Compare all that the model has, but its routers, with the result; not by the plan's rules.

    Where one tensor holds the experts of a layer, the old ones come first.

    Returns:
        Number of tensors.

    Raises:
        ProofError: names the first that differs.
    """
    family = addition.architecture
    routers = {
        family.layer_prefix(addition.config, layer) + family.router_name
        for layer in addition.resolved.moe_layers
    }
    names = [name for name in addition.moe.specs if name not in routers]
    total = sum(addition.moe.specs[name].nbytes for name in names)
    with progress_bar("Comparing with the model", total, progress) as bar:
        for name in names:
            old, new = addition.moe.specs[name], result.specs.get(name)
            there = new is not None and new.dtype == old.dtype and new.numel >= old.numel
            if not there or not all(
                same_bits(before, after)
                for before, after in aligned(
                    addition.moe.chunks(name), result.chunks(name, 0, old.numel)
                )
            ):
                raise ProofError(
                    f"Tensor {name} of the model is not in the result: the output is damaged."
                )
            bar.update(old.nbytes)
    return len(names)
