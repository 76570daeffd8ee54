"""Nothing missing, nothing left: every source tensor is used, every target tensor made once."""

from collections.abc import Mapping

import torch

from fusion_upcycle.checkpoint.tensors import TensorSource, TensorSpec, aligned
from fusion_upcycle.conversion.rules import Carried, Rule
from fusion_upcycle.errors import UpcyclingError


def check_tied(source: TensorSource, tied: Mapping[str, str]) -> set[str]:
    """Tied tensors that the source holds a second time: fine when equal, refused when not."""
    equal, different = held_twice(source, tied)
    for name in different:
        raise UpcyclingError(
            f"config.json says tie_word_embeddings=true, but {name} differs from {tied[name]}. "
            "Set it to false to keep both, or remove the tensor that is not used."
        )
    return equal


def held_twice(source: TensorSource, tied: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Tied tensors that the source holds a second time: those that are equal, and the others."""
    equal: set[str] = set()
    different: set[str] = set()
    for name, twin in tied.items():
        if name not in source.specs or twin not in source.specs:
            continue
        # Known by its config alone, a model that has a second tensor has it for a reason.
        same = (
            getattr(source, "has_data", True)
            and source.specs[name].shape == source.specs[twin].shape
            and all(torch.equal(a, b) for a, b in aligned(source.chunks(name), source.chunks(twin)))
        )
        (equal if same else different).add(name)
    return equal, different


def check_complete(
    source: TensorSource, rules: Mapping[str, Rule], expected: Mapping[str, TensorSpec]
) -> dict[str, Rule]:
    """Every expected tensor has one rule, and the right shape; returns them in writing order.

    Raises:
        UpcyclingError: a tensor that the source lacks, or one of another shape.
    """
    for name in expected:
        if name not in rules:
            raise UpcyclingError(
                f"The source lacks tensor {name}, which its config.json calls for. The checkpoint "
                "is incomplete"
                + (
                    " (or its embeddings are tied: set tie_word_embeddings=true)."
                    if "lm_head" in name
                    else "."
                )
            )
    assert rules.keys() <= expected.keys(), sorted(rules.keys() - expected.keys())[:3]
    for name, rule in rules.items():
        if isinstance(rule, Carried):
            check_shape(rule.source, source.specs[rule.source].shape, expected[name].shape)
    return {name: rules[name] for name in sorted(expected, key=writing_order)}


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Compare the shape of a source tensor with that which its config calls for.

    Raises:
        UpcyclingError: they differ.
    """
    if found != expected:
        raise UpcyclingError(
            f"Source tensor {name} has shape {list(found)}, but its config.json calls for "
            f"{list(expected)}: the config belongs to another model."
        )


def writing_order(name: str) -> tuple[int, list[int], str]:
    """Embeddings, then layer by layer and expert by expert, then the rest."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    section = 1 if numbers else 0 if "embed" in name else 2
    return section, numbers, name
