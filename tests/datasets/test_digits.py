import numpy as np
from sklearn.datasets import load_digits

from saccade.datasets import DigitsData


def test_every_digit_is_in_one_split_with_its_pixels():
    data = DigitsData()
    train, val = data.samples("train"), data.samples("val")
    assert len(train) + len(val) == len({sample.id for sample in train + val}) == 1797
    assert 0.19 < len(val) / 1797 < 0.21
    digits = load_digits()
    for sample in (train[0], val[0], val[-1]):
        index = int(sample.id.removeprefix("digits/"))
        assert sample.target == digits.target[index]
        np.testing.assert_allclose(np.asarray(sample.load())[..., 0], digits.images[index] * 255 / 16, atol=0.5)


def test_evaluation_uses_the_held_out_part():
    data = DigitsData()
    held_out = [sample.id for sample in data.samples("val")]
    assert [sample.id for sample in data.samples("test")] == held_out
    assert [sample.id for sample in data.samples("predict")] == held_out
