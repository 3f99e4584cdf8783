"""Published systems of each kind of image layout train the same however a run is split."""

import pytest

from tests.equivalence import SYSTEMS, differences


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_and_gradients_do_not_depend_on_the_split(tmp_path, system):
    """One process and two: accumulated, packed, replicas, sharded, balanced, resumed."""
    found = list(differences(tmp_path, (1, 2), (system,)))
    assert len(found) > 10
    assert not [way for way in found if max(way[2:]) > 1e-5]
