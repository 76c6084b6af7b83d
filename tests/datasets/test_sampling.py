import pytest

from saccade.datasets.sampling import EvaluationSampler, TrainingSampler
from saccade.errors import ConfigError


@pytest.mark.parametrize(("count", "replicas"), [(10, 3), (9, 3), (7, 4), (4, 4), (5, 1)])
def test_evaluation_covers_every_sample_once(count, replicas):
    shares = [list(EvaluationSampler(range(count), replicas, rank)) for rank in range(replicas)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert [len(EvaluationSampler(range(count), replicas, rank)) for rank in range(replicas)] == [
        len(s) for s in shares
    ]


def test_a_rank_without_samples_is_refused():
    with pytest.raises(ConfigError, match="3 samples cannot be shared by 4 processes"):
        EvaluationSampler(range(3), 4, 0)


def test_training_order_and_seeds_depend_on_seed_and_epoch_alone():
    def epoch(seed, number):
        sampler = TrainingSampler(range(20), 1, 0, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    first = epoch(0, 0)
    assert sorted(index for index, _ in first) == list(range(20))
    assert len({seed for _, seed in first}) == 20
    assert epoch(0, 0) == first
    assert epoch(0, 1) != first
    assert dict(epoch(0, 1)) != dict(first)
    assert epoch(1, 0) != first


def test_training_can_begin_within_an_epoch_once():
    whole = list(TrainingSampler(range(20), 1, 0, seed=0, epoch=3))
    sampler = TrainingSampler(range(20), 1, 0, seed=0, epoch=3, skip=8)
    assert len(sampler) == 20
    assert list(sampler) == whole[8:]
    assert list(sampler) == whole


def test_training_shares_are_equally_long():
    shares = [[index for index, _ in TrainingSampler(range(7), 2, rank, seed=0)] for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert set(shares[0]) | set(shares[1]) == set(range(7))
