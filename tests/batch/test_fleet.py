"""Work on a Ray cluster: a local one of two cores, whose workers are killed."""

import os
from functools import partial

import pytest

from saccade.batch.fleet import Fleet
from saccade.errors import ConfigError, DataError, MissingResourceError
from tests.batch.fleet_functions import die, refuse, squares

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::Warning:ray")]


def test_no_cluster_there(monkeypatch):
    pytest.importorskip("ray", reason="Ray is an extra")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(MissingResourceError, match=r"'127.0.0.1:1' cannot be reached"), Fleet():
        pass


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores that outlives the connections of single tests."""
    ray = pytest.importorskip("ray", reason="Ray is an extra")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_killed_workers_lose_nothing(tmp_path):
    said = []
    with Fleet() as fleet:
        assert (fleet.has_gpus(), fleet.largest_node, fleet.room(1, 0)) == (False, 2, 2)
        results = dict(fleet.map(partial(squares, str(tmp_path)), list(range(12)), say=said.append))
    killer = results.pop(7)
    assert isinstance(killer, DataError)
    assert killer.reason == "worker_died"
    assert results == {item: item**2 for item in range(12) if item != 7}
    assert len(list(tmp_path.glob("try-7-*"))) == 3
    assert len(list(tmp_path.glob("built-*"))) >= 2
    assert all("tried again" in line for line in said)


@pytest.mark.usefixtures("cluster")
def test_what_cannot_work_is_said():
    with Fleet() as fleet:
        assert list(fleet.map(die, [])) == []
        assert fleet.call(max, 3, 4) == 4
        with pytest.raises(ConfigError, match="this node will not"):
            list(fleet.map(refuse, [1]))
        with pytest.raises(ConfigError, match="needs the same saccade and Python"):
            list(fleet.map(die, [1]))
        with pytest.raises(ConfigError, match=r"No node of the Ray cluster has 3 CPUs .* has 2 CPUs"):
            fleet.room(3, 0)
        with pytest.raises(ConfigError, match="1 GPU"):
            fleet.room(1, 1)
