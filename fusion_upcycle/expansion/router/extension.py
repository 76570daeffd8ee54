"""Router extensions as options say them: names, options, and a rehearsal of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_upcycle.architectures.routing import RoutingRule
from fusion_upcycle.checks import make_initialiser
from fusion_upcycle.errors import UpcyclingError, unknown
from fusion_upcycle.expansion.router.fit import MIN_COPY_SHARE, STEPS, fit_rows
from fusion_upcycle.expansion.router.split import MIXED_SHARE, split_rows
from fusion_upcycle.experts import generator_for
from fusion_upcycle.router_extension import ROUTER_EXTENSIONS, RouterExtension

#: Router extensions that look at router inputs of calibration text -> their options and defaults.
CALIBRATED: dict[str, dict[str, Any]] = {
    "split": {"mixed_share": MIXED_SHARE},
    "fit": {"steps": STEPS, "min_copy_share": MIN_COPY_SHARE},
}


@dataclass(frozen=True)
class Calibrated:
    """A router extension that looks at router inputs: its name, and all options of it.

    Raises:
        UpcyclingError: an unknown option, or one out of range.
    """

    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        for option in self.options:
            if option not in CALIBRATED[self.name]:
                kind = f"option of router_extension {self.name}:"
                raise unknown(kind, str(option), CALIBRATED[self.name])
        object.__setattr__(self, "options", CALIBRATED[self.name] | self.options)
        steps = self.options.get("steps", 1)
        if type(steps) is not int or steps < 1:
            raise UpcyclingError(f"steps={steps!r} of router_extension=fit must be 1 or more.")
        self._rehearse()

    def _rehearse(self) -> None:
        """Make rows of a toy, so that an option out of range is said before any work."""
        generator = generator_for(0, 0, 0, "rehearsal")
        toy = torch.randn(2, 3, generator=generator), torch.randn(16, 3, generator=generator)
        if self.name == "split":
            split_rows(*toy, 2, RoutingRule(1), generator, **self.options)
        else:
            start = torch.cat([toy[0], -toy[0]])
            options = self.options | {"steps": 1}
            fit_rows(*toy, (0, 1, 0, 1), RoutingRule(1), generator, start_MD=start, **options)


def find_router_extension(spec: Any) -> RouterExtension | Calibrated:
    """The router extension of a name, a mapping with options, or a function.

    Raises:
        UpcyclingError: an unknown name or option, or a function that is no router extension.
    """
    if isinstance(spec, Calibrated):
        return spec
    if isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec):
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name")
        if name in CALIBRATED:
            return Calibrated(name, options)
        if name not in ROUTER_EXTENSIONS:
            raise unknown("router_extension", str(name), [*ROUTER_EXTENSIONS, *CALIBRATED])
    extension: RouterExtension = make_initialiser(spec, ROUTER_EXTENSIONS, "router_extension")
    toy = torch.arange(3.0)
    extended = extension(toy, (0, 1, 2, 0), generator_for(0, 0, 0, "rehearsal"))
    if not isinstance(extended, Tensor) or extended.shape != (4,):
        raise UpcyclingError(f"router_extension {spec!r} must return a row for each new expert.")
    return extension
