import numpy as np
import pytest

from saccade.datasets import draw_slide, save_slide
from saccade.errors import ConfigError
from saccade.mil import Slide, find_tissue


@pytest.fixture(scope="module")
def slides():
    return [draw_slide(index) for index in range(6)]


def test_patients_and_labels(slides):
    assert [slide.patient for slide in slides][:3] == ["patient-000", "patient-000", "patient-001"]
    labels = {}
    for slide in slides:
        assert labels.setdefault(slide.patient, slide.label) == slide.label
        assert slide.lesion.any() == (slide.label == "lesion")
        assert not (slide.lesion & ~slide.tissue).any()
        assert slide.pixels.shape[:2] == (slide.tissue.shape[0] * 8, slide.tissue.shape[1] * 8)
    assert set(labels.values()) == {"lesion", "normal"}


def test_equal_seeds_draw_equal_slides(slides):
    again = draw_slide(1)
    np.testing.assert_array_equal(again.pixels, slides[1].pixels)
    np.testing.assert_array_equal(again.lesion, slides[1].lesion)
    assert (draw_slide(1, seed=1).pixels.shape != again.pixels.shape) or (
        draw_slide(1, seed=1).pixels != again.pixels
    ).any()


def test_a_saved_slide_opens_as_a_pyramid_with_its_resolution_and_tissue(slides, tmp_path):
    save_slide(slides[0], tmp_path / "a.tif")
    with Slide(tmp_path / "a.tif") as slide:
        assert (slide.height, slide.width) == slides[0].pixels.shape[:2]
        assert [round(level.downsample) for level in slide.levels] == [1, 4, 16]
        assert (slide.resolution.x, slide.resolution.y) == (0.5, 0.5)
        found = find_tissue(slide).mask
        assert (
            np.abs(slide.read_scaled(0, 0, 256, 256, (256, 256)).astype(int) - slides[0].pixels[:256, :256]).mean() < 2
        )
    true = slides[0].tissue[::2, ::2][: found.shape[0], : found.shape[1]]
    found = found[: true.shape[0], : true.shape[1]]
    assert (found & true).sum() / (found | true).sum() > 0.95


def test_a_negative_index_is_refused():
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        draw_slide(-1)
