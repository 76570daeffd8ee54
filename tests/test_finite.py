"""Values that are no numbers are seen in the bits of every dtype."""

import pytest
import torch

from fusion_upcycle.conversion.finite import finite
from fusion_upcycle.errors import UpcyclingError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_bits_of_no_number_are_refused_and_every_number_passes(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, 1.0], dtype=dtype)
    assert [t.tolist() for t in finite(lambda _: iter([numbers]))("w")] == [numbers.tolist()]
    for bad in ("nan", "-nan", "inf", "-inf"):
        sign = -1.0 if bad[0] == "-" else 1.0
        value = torch.tensor(float(bad.removeprefix("-")), dtype=dtype).copysign(torch.tensor(sign))
        damaged = torch.cat([numbers, value[None], numbers])
        with pytest.raises(UpcyclingError, match=r"w of the result has a value"):
            list(finite(lambda _, damaged=damaged: iter([damaged]))("w"))
