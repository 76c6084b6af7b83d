import numpy as np
import pytest
from PIL import Image

from saccade.errors import ConfigError, DataError
from saccade.vision_backbones.overlay import view_of
from saccade.vision_backbones.places import locate, parse_place

CONFIG = {
    "input_size": (3, 96, 96),
    "interpolation": "bilinear",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 0.875,
    "crop_mode": "center",
}


@pytest.mark.parametrize("crop", [0.875, 1.0])
@pytest.mark.parametrize("target", [(96, 96), (64, 96)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(451, 300), (300, 512)])
def test_the_place_in_the_view_is_that_of_the_photograph(size, mode, target, crop):
    """A photograph whose colours tell the coordinates has the right ones where the place is said to be."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    photograph = Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8))
    config = CONFIG | {"crop_mode": mode, "input_size": (3, *target), "crop_pct": crop}
    view = view_of(photograph, config)
    for place in [(size[0] // 2, size[1] // 2), (int(size[0] * 0.4), int(size[1] * 0.6)), (0.55, 0.35)]:
        across, down = locate(place, size, config)
        red, green, _ = view[int(down * view.shape[0]), int(across * view.shape[1])]
        expected = [p if isinstance(p, float) else p / s for p, s in zip(place, size, strict=True)]
        assert red / 255 == pytest.approx(expected[0], abs=0.01)
        assert green / 255 == pytest.approx(expected[1], abs=0.01)


def test_places_that_the_model_does_not_see():
    with pytest.raises(DataError, match="which its crop leaves out") as caught:
        locate((10, 100), (451, 300), CONFIG)
    assert caught.value.reason == "place_outside"
    with pytest.raises(DataError, match="has 451 x 300 pixels and none at"):
        locate((100, 300), (451, 300), CONFIG)
    whole = CONFIG | {"crop_pct": 1.0, "crop_mode": "squash"}
    assert locate((1.0, 0.0), (451, 300), whole) == (pytest.approx(1), 0)
    assert locate((1.0, 0.0), (451, 300), whole)[0] < 1
    assert locate((450, 0), (451, 300), whole)[0] < 1


def test_places_in_words():
    assert parse_place("310,180") == (310, 180)
    assert isinstance(parse_place("0,1")[0], int)
    assert parse_place("0.5, 0.25") == (0.5, 0.25)
    for wrong in ("310", "1,2,3", "a,b", "0.5,180", "1.5,0.2", "-3,4", "nan,0.5", ""):
        with pytest.raises(ConfigError, match="X,Y in pixels"):
            parse_place(wrong)
