"""Published systems of each kind of image layout train the same however a run is split."""

import pytest

from tests.equivalence import SYSTEMS, differences

WAYS = ("accumulation 4", "packed, accumulation 2", "resumed", "2 sharded, packed")
"""The others combine these; `python -m tests.equivalence` runs all."""


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_and_gradients_do_not_depend_on_the_split(tmp_path, system):
    found = list(differences(tmp_path, (1, 2), (system,), WAYS))
    assert [way for _, way, *_ in found] == [*WAYS]
    assert not [way for way in found if max(way[2:]) > 1e-5]
