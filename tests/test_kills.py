"""A process that is killed while it saves loses nothing that was complete."""

import pytest

from benchmarks import kill_saves


@pytest.mark.parametrize("way", kill_saves.WAYS)
def test_twenty_kills(way, tmp_path):
    """As many as fit; `python -m benchmarks.kill_saves` does a hundred."""
    met = list(kill_saves.kills(tmp_path, 20, seed=0, way=way))
    assert all(kill.lost_nothing for kill in met), met
    assert sum(kill.inside for kill in met) >= 5, "the moments hardly met a save"
    found = [kill.found for kill in met if kill.found is not None]
    assert found == sorted(found)
    assert found[-1] >= 3, "hardly a save was completed"
