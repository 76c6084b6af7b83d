import numpy as np

from saccade.vision_backbones.panel_overlay import GAP, QUERY, borders, draw_panels
from saccade.vision_backbones.point_maps import Panel

GREY = np.full((300, 400, 3), 128, np.uint8)
EDGES = {"rows": np.arange(4) / 3, "columns": np.array([0, 0.25, 0.5, 1.0])}


def panel(cells, values, query=(2, 2), low=0.0):
    used = np.zeros((3, 3), bool)
    whole = np.zeros((3, 3), np.float32)
    for cell, value in zip(cells, values, strict=True):
        used[cell], whole[cell] = True, value
    return Panel(whole, used, **EDGES, query=query, low=low, title="a title")


def drawn(*panels, alpha=1.0):
    return np.asarray(draw_panels(GREY, panels, "cat  93.1%", (0.9, 0.95), alpha=alpha), int)


def test_cells_that_take_part_are_coloured_to_their_edges_and_no_others():
    picture = drawn(panel([(0, 0), (1, 1)], [0.2, 0.8]))[:300]
    brightness = picture.sum(2)
    assert (picture[10:90, 110:390] == 128).all()  # rest of the first row of cells
    assert brightness[110:190, 110:190].min() > brightness[10:90, 10:90].max()
    assert np.ptp(brightness[110:190, 110:190]) == 0  # a cell has one colour: nothing is smoothed
    assert (picture[150, 99] == 255).all() or (picture[150, 100] == 255).all()  # white line between cells


def test_the_cell_that_asks_and_the_place_are_marked():
    picture = drawn(panel([(0, 0)], [1.0]))[:300]
    blue = (picture == QUERY).all(2)
    rows, columns = np.nonzero(blue)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (200, 299, 200, 399)
    assert blue[275:296, 350:371].sum() > 20  # the ring
    assert not blue[285, 360]  # and not a disc


def test_equal_weights_are_bright_and_opacity_counts():
    equal = drawn(panel([(0, 0), (0, 1)], [0.5, 0.5], low=0.5))[:300]
    assert equal[50, 50].sum() > 500
    assert (drawn(panel([(0, 0)], [1.0]), alpha=0.0)[20:80, 20:80] == 128).all()


def test_two_panels_stand_side_by_side():
    one, two = panel([(0, 0)], [1.0]), panel([(1, 1)], [1.0])
    both = drawn(one, two)
    assert both.shape[1] == 2 * 400 + GAP
    np.testing.assert_array_equal(both[:, :400], drawn(one))
    np.testing.assert_array_equal(both[:, 400 + GAP :], drawn(two))


def test_borders_surround_and_do_not_divide():
    assert sorted(borders(np.array([[True, True], [False, False]]))) == [
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0)),
        ((0, 1), (0, 2)),
        ((0, 2), (1, 2)),
        ((1, 0), (1, 1)),
        ((1, 1), (1, 2)),
    ]
