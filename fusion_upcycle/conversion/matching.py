"""An adapter's file against its base: each tensor has its place, or is refused by name.

Which matrix a pair belongs to is asked of transformers' own class of the base, as PEFT asks it.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusion_upcycle.architectures.layout import built, class_name, tied_names
from fusion_upcycle.checkpoint.adapter import AdapterSource, BiasPair, Pair
from fusion_upcycle.checkpoint.adapter_config import WEIGHTS_FILE, AdapterConfig
from fusion_upcycle.checkpoint.located import Located
from fusion_upcycle.checkpoint.peft import merge_command
from fusion_upcycle.checkpoint.reader import CheckpointReader
from fusion_upcycle.checkpoint.tensors import TensorSource, aligned
from fusion_upcycle.errors import UpcyclingError, setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
#: What a module's entries are, by the two that it must have.
_MATRICES = ("lora_A.weight", "lora_B.weight")
_EMBEDDINGS = ("lora_embedding_A", "lora_embedding_B")


class Matching:
    """An adapter's file against its base."""

    def __init__(
        self, at: Located, said: AdapterConfig, base: TensorSource, config: "PreTrainedConfig"
    ):
        assert at.adapter is not None
        self.at, self.said, self.base, self.config = at, said, base, config
        self.path = at.adapter / WEIGHTS_FILE
        self.file = CheckpointReader(at.adapter, file=WEIGHTS_FILE)
        model = built(config)
        self.modules = dict(model.named_modules())
        self.tied = tied_names(model)

    def source(self) -> AdapterSource:
        """The base with the adapter on it.

        Raises:
            UpcyclingError: a tensor that has no place, by name.
        """
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        whole: dict[str, str] = {}
        for name in self.file.specs:
            self._check_finite(name)
            if not name.startswith(_PREFIX):
                raise self._refused(
                    name,
                    f"does not begin with {_PREFIX}: PEFT would leave it out. Save the adapter by "
                    "PEFT's save_pretrained.",
                )
            own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            if match := _PART.fullmatch(own):
                parts[match[1]][match[2]] = name
            else:
                whole[own] = name
        pairs: dict[str, Pair | BiasPair] = {}
        for module, found in parts.items():
            pairs |= self._pairs(module, found)
        self._check_targets(parts.keys() | {name.rpartition(".")[0] for name in whole})
        whole = {own: name for own, name in whole.items() if self._replaces(own, name)}
        for twin, first in self.tied.items():
            self._check_tied(twin, first, pairs, whole)
        return AdapterSource(self.base, self.file, pairs, whole)

    def _pairs(self, module: str, found: Mapping[str, str]) -> dict[str, Pair | BiasPair]:
        """What a module's entries in the file change: name in the base -> how."""
        some = next(iter(found.values()))
        kind = self.modules.get(module)
        if kind is None:
            raise self._refused(
                some, f"is of {module}, which the base does not have. {self._another_base}"
            )
        embedding = isinstance(kind, nn.Embedding)
        turned = embedding or isinstance(kind, Conv1D)
        if not (turned or isinstance(kind, nn.Linear)):
            raise self._refused(
                some, f"is of {module}, a {type(kind).__name__} and no matrix. {self._by_peft}"
            )
        a, b = _EMBEDDINGS if embedding else _MATRICES
        for part, other in ((a, b), (b, a)):
            if part not in found:
                raise self._refused(
                    some, f"of {module} has no {part} beside it. {self._damaged(other)}"
                )
        weight = f"{module}.weight"
        if self._held(weight) not in self.base.specs:
            raise self._refused(some, f"changes {weight}, which the base lacks. {self._by_peft}")
        shape = self.base.specs[self._held(weight)].shape
        wide, narrow = shape if turned else shape[::-1]  # in, out
        self._check_pair(module, found[a], found[b], wide, narrow)
        rest = found.keys() - {a, b}
        magnitude = found.get("lora_magnitude_vector")
        if (magnitude is not None) != self.said.dora or (magnitude is not None and embedding):
            said = f"use_dora={str(self.said.dora).lower()}"
            have = "a" if magnitude is not None else "no"
            raise self._refused(
                magnitude or some,
                f"does not fit: {said} in adapter_config.json, and {module} has {have} "
                f"lora_magnitude_vector. {self._by_peft}",
            )
        if magnitude is not None and self.file.specs[magnitude].shape != (narrow,):
            raise self._refused(magnitude, f"is not of shape [{narrow}]. {self._another_base}")
        scale = self.said.scale(module)
        made: dict[str, Pair | BiasPair] = {
            weight: Pair(found[a], found[b], scale, turned, magnitude)
        }
        if (bias := found.get("lora_B.bias")) is not None and not embedding:
            own = f"{module}.bias"
            if own not in self.base.specs or self.file.specs[bias].shape != (narrow,):
                raise self._refused(
                    bias, f"is for {own} [{narrow}], which the base does not have. {self._by_peft}"
                )
            made[own] = BiasPair(bias, scale)
        for part in rest - {"lora_magnitude_vector", "lora_B.bias"}:
            raise self._refused(found[part], f"is no part of a {type(kind).__name__}'s adapter.")
        return made

    def _check_pair(self, module: str, a: str, b: str, wide: int, narrow: int) -> None:
        rank, specs = self.said.rank(module), self.file.specs
        for name, shape in ((a, (rank, wide)), (b, (narrow, rank))):
            if specs[name].shape == shape:
                continue
            if len(specs[name].shape) == 2 and rank not in specs[name].shape:
                raise self._refused(
                    name,
                    f"has shape {list(specs[name].shape)}, and adapter_config.json says rank "
                    f"{rank} for {module}. Repair r or rank_pattern there.",
                )
            raise self._refused(
                name,
                f"has shape {list(specs[name].shape)}, and the base's {module} calls for "
                f"{list(shape)}. {self._another_base}",
            )

    def _replaces(self, own: str, name: str) -> bool:
        """Whether a whole tensor of the file differs from the base's."""
        held = self._held(own)
        if held not in self.base.specs:
            raise self._refused(
                name, f"has no place in the base, and is no part of a LoRA. {self._by_peft}"
            )
        base, found = self.base.specs[held], self.file.specs[name]
        if found.shape != base.shape:
            tokens = (
                " It was trained with added tokens: the base must have as many rows."
                if found.shape[1:] == base.shape[1:]
                else ""
            )
            raise self._refused(
                name,
                f"has shape {list(found.shape)}, and the base's {own} {list(base.shape)}.{tokens} "
                f"{self._another_base}",
            )
        pieces = aligned(self.file.chunks(name), self.base.chunks(held))
        return not all(torch.equal(new.to(base.dtype), old) for new, old in pieces)

    def _check_tied(
        self,
        twin: str,
        first: str,
        pairs: dict[str, Pair | BiasPair],
        whole: dict[str, str],
    ) -> None:
        """What is one tensor in the base must be one with the adapter, too."""
        if not {twin, first} & (pairs.keys() | whole.keys()):
            return
        if not (
            self._same_pair(pairs.get(twin), pairs.get(first)) and self._same(twin, first, whole)
        ):
            raise UpcyclingError(
                f"{self.path} changes {first} and {twin} each for itself, or one alone, and they "
                f"are one tensor in the base ({self.at.folder}: tie_word_embeddings). Untie them: "
                f"{self._untie(twin)} then put the adapter on {self.at.folder}-untied."
            )
        if twin not in self.base.specs:
            pairs.pop(twin, None)
            whole.pop(twin, None)

    def _same_pair(self, twin: Pair | BiasPair | None, first: Pair | BiasPair | None) -> bool:
        """Whether a head's pair is its embedding's, as PEFT ties them (ensure_weight_tying)."""
        if not (isinstance(twin, Pair) and isinstance(first, Pair)):
            return twin is first
        turned = twin.turned != first.turned
        a, b = (first.b, first.a) if turned else (first.a, first.b)
        return twin.scale == first.scale and all(
            torch.equal(self.file.tensor(own), other.t() if turned else other)
            for own, other in ((twin.a, self.file.tensor(a)), (twin.b, self.file.tensor(b)))
        )

    def _same(self, twin: str, first: str, whole: Mapping[str, str]) -> bool:
        names = [whole[name] for name in (twin, first) if name in whole]
        tensors = [self.file.tensor(name) for name in names]
        return len(tensors) != 1 and all(torch.equal(tensors[0], other) for other in tensors[1:])

    def _check_targets(self, found: Collection[str]) -> None:
        """Every module that adapter_config.json names has its pair."""
        if self.said.targets is None:
            return
        for name, module in self.modules.items():
            layer = re.match(r".*\.[^.]*\.(\d+)\.", name)
            left_out = self.said.layers is not None and not (
                layer and int(layer[1]) in self.said.layers
            )
            if (
                _named(name, self.said.targets)
                and not _named(name, self.said.excluded)
                and not left_out
                and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
                and name not in found
            ):
                raise UpcyclingError(
                    f"{self.path} lacks lora_A and lora_B of {name}, which adapter_config.json "
                    f"names (target_modules). {self._damaged('it')}"
                )

    def _held(self, name: str) -> str:
        """The name under which the base holds a tensor: its own, or of what it is tied to."""
        return name if name in self.base.specs else self.tied.get(name, name)

    def _check_finite(self, name: str) -> None:
        if not all(piece.isfinite().all() for piece in self.file.chunks(name)):
            raise self._refused(name, "has values that are not finite. The training went wrong.")

    def _refused(self, name: str, why: str) -> UpcyclingError:
        return UpcyclingError(f"{self.path}: tensor {name} {why}")

    def _damaged(self, what: str) -> str:
        return f"The file is incomplete ({what} alone is no adapter). Download it again."

    @property
    def _another_base(self) -> str:
        return (
            f"The adapter is of another model than {self.at.folder}. Give the one that it was "
            f"trained on: {setting('base', 'FOLDER')}."
        )

    @property
    def _by_peft(self) -> str:
        assert self.at.adapter is not None
        return f"Merge it with PEFT: {merge_command(self.at.adapter, self.at.folder)}."

    def _untie(self, twin: str) -> str:
        module = twin.rpartition(".")[0]
        return (
            f'python -c "import torch; from transformers import {class_name(self.config)} as M; '
            f"m = M.from_pretrained('{self.at.folder}', dtype='auto'); m.{module}.weight = "
            f"torch.nn.Parameter(m.{module}.weight.detach().clone()); "
            "m.config.tie_word_embeddings = False; "
            f"m.save_pretrained('{self.at.folder}-untied')\" and take the tokenizer files over,"
        )


def _named(module: str, names: Collection[str]) -> bool:
    """As PEFT finds modules by their names or the ends of them."""
    return any(module == name or module.endswith(f".{name}") for name in names)
