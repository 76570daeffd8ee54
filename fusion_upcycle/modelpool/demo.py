"""FusionBench model pool of the demo models: shipped with the package, no download."""

from collections.abc import Mapping
from typing import Any

from fusion_bench import auto_register_config
from fusion_bench.modelpool import CausalLMPool

from fusion_upcycle.demo import demo_model
from fusion_upcycle.errors import UpcyclingError


@auto_register_config
class DemoCausalLMPool(CausalLMPool):
    """A ``CausalLMPool`` whose ``models`` are names of demo models, see `fusion_upcycle.demo`.

    They become the folders of these models, so that methods which read checkpoints from disk work
    as with any local path, and the tokenizer is theirs.

    Raises:
        UpcyclingError: no model, or an unknown demo name.
    """

    def __init__(
        self, models: Mapping[str, str], *, model_kwargs: Any = None, **kwargs: Any
    ) -> None:
        if not models:
            raise UpcyclingError("modelpool.models is empty: give {name: demo model}, e.g. base.")
        folders = {name: str(demo_model(demo)) for name, demo in models.items()}
        super().__init__(
            folders,
            tokenizer=next(iter(folders.values())),  # all demo models have the same
            model_kwargs=model_kwargs,
            **kwargs,
        )
