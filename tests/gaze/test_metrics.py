"""Scanpath metrics: invariances, defined values where the literature's code fails, literal forms on random pairs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet
from saccade.gaze import metrics as gm

WIDTH, HEIGHT = 800, 600


def make(rows, **columns):
    """Make a path of ``(x, y, seconds)`` rows."""
    x, y, duration = zip(*rows, strict=True)
    return Scanpath(**{"image": "a", "x": x, "y": y, "duration": duration, "width": WIDTH, "height": HEIGHT, **columns})


def collect(paths):
    """Make a set of paths, numbered."""
    rows = [list(zip(p.x, p.y, p.duration, strict=True)) for p in paths]
    return ScanpathSet.from_paths([make(row, sample=number) for number, row in enumerate(rows)])


whole = st.integers(0, 80)  # multiples of 10 px: many ties, exact sums
fixations = st.tuples(
    whole.map(lambda v: 10.0 * min(v, 79)),
    whole.map(lambda v: min(10.0 * v, 590.0)),
    st.integers(1, 40).map(lambda v: v / 50),
)
scanpaths = st.lists(fixations, min_size=1, max_size=9).map(make)
pairs = st.tuples(scanpaths, scanpaths)


def regions(human):
    """Regions of the image from the given paths."""
    return gm.fit_clusters(collect(human))


SIMILARITIES = {  # 1 for equal paths
    "scanmatch": gm.scanmatch,
    "scanmatch_time": lambda a, b: gm.scanmatch(a, b, bin_s=0.02),
    "multimatch": lambda a, b: gm.multimatch(a, b).T,
    "multimatch_grouped": lambda a, b: gm.multimatch(a, b, grouping=gm.Grouping()).T,
    "stde": gm.scaled_time_delay_embedding,
    "sequence_score": lambda a, b: gm.sequence_score(a, b, regions([a, b])),
}
DISTANCES = {  # 0 for equal paths
    "dtw": gm.dtw,
    "frechet": gm.frechet,
    "hausdorff": gm.hausdorff,
    "eyenalysis": gm.eyenalysis,
    "sed": gm.string_edit_distance,
    "fed": lambda a, b: gm.fixation_edit_distance(a, b, regions([a, b])),
    "tde": lambda a, b: gm.time_delay_embedding(a, b, k=1),
    "tde_max": lambda a, b: gm.time_delay_embedding(a, b, k=2, mode="max"),
}
ASYMMETRIC = ("stde", "tde", "tde_max")
quick = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", [*SIMILARITIES, *DISTANCES])
@quick
@given(path=scanpaths)
def test_identity(name, path):
    got = {**SIMILARITIES, **DISTANCES}[name](path, path)
    expected = 1.0 if name in SIMILARITIES else 0.0
    np.testing.assert_allclose(got[~np.isnan(got)], expected, atol=1e-12)
    assert np.isnan(got).any() == (
        (name.startswith("multimatch") and len(path) < 3) or (name == "tde_max" and len(path) < 2)
    )


@pytest.mark.parametrize("name", [*SIMILARITIES, *DISTANCES])
@quick
@given(pair=pairs)
def test_range_and_symmetry(name, pair):
    first, second = pair
    got = {**SIMILARITIES, **DISTANCES}[name](first, second)
    known = got[~np.isnan(got)]
    assert (known >= 0).all() or name.startswith("scanmatch")
    if name in SIMILARITIES:
        assert (known <= 1 + 1e-12).all()
    if name not in ASYMMETRIC and not name.startswith("multimatch"):
        np.testing.assert_allclose({**SIMILARITIES, **DISTANCES}[name](second, first), got, atol=1e-9)


@quick
@given(pair=pairs, shift=st.integers(-30, 30), scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_moves_and_units(pair, shift, scale):
    """Distances scale with the unit; MultiMatch sees neither place nor scale, save for the place of both."""
    first, second = pair

    def changed(path):
        return Scanpath(
            image="a", x=path.x * scale + shift, y=path.y * scale - shift, duration=path.duration * 3,
            width=WIDTH * scale, height=HEIGHT * scale,
        )  # fmt: skip

    a, b = changed(first), changed(second)
    for function in (gm.dtw, gm.frechet, gm.hausdorff, gm.eyenalysis, lambda a, b: gm.time_delay_embedding(a, b, k=1)):
        np.testing.assert_allclose(function(a, b), scale * function(first, second), rtol=1e-9)
    np.testing.assert_allclose(gm.multimatch(a, b), gm.multimatch(first, second), atol=1e-9)
    np.testing.assert_allclose(
        gm.recurrence(a, b, radius=64.5 * scale), gm.recurrence(first, second, radius=64.5), atol=1e-9
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(paths=st.lists(scanpaths, min_size=2, max_size=8))
def test_pairs_do_not_depend_on_their_company(paths):
    """All pairs at once, in any order, give what each gives alone."""
    together = collect(paths)
    i, j = np.triu_indices(len(paths))
    for function in (gm.scanmatch, gm.multimatch, gm.dtw, gm.frechet, gm.hausdorff, gm.string_edit_distance,
                     gm.scaled_time_delay_embedding, gm.time_delay_embedding, gm.recurrence):  # fmt: skip
        batch = function(together.take(i), together.take(j))
        alone = np.concatenate([function(paths[a], paths[b]) for a, b in zip(i, j, strict=True)])
        np.testing.assert_allclose(batch, alone, atol=1e-12, err_msg=function.__name__)


def literal_alignment(a, b, score, gap):
    table = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            ways = [table[i - 1][j - 1] + score(a[i - 1], b[j - 1])] if i and j else []
            ways += [table[i - 1][j] + gap] if i else []
            ways += [table[i][j - 1] + gap] if j else []
            table[i][j] = max(ways, default=0.0)
    return table[-1][-1]


@quick
@given(pair=pairs, gap=st.sampled_from([0.0, -0.5, -2.0, 0.25]))
def test_scanmatch_is_its_recurrence(pair, gap):
    cells = [
        [(math.floor(x * 16 / WIDTH), math.floor(y * 12 / HEIGHT)) for x, y in zip(p.x, p.y, strict=True)] for p in pair
    ]
    best = literal_alignment(*cells, lambda a, b: 3.5 - math.dist(a, b), gap)
    expected = best / (3.5 * max(map(len, cells)))
    assert gm.scanmatch(*pair, gap=gap)[0] == pytest.approx(expected, abs=1e-12)


@quick
@given(pair=pairs)
def test_warping_is_its_recurrence(pair):
    a, b = ([*zip(p.x, p.y, strict=True)] for p in pair)
    for function, join in ((gm.dtw, lambda cost, best: cost + best), (gm.frechet, max)):
        table = {}
        for i in range(len(a)):
            for j in range(len(b)):
                before = [table[c] for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if c in table]
                cost = math.dist(a[i], b[j])
                table[i, j] = join(cost, min(before)) if before else cost
        assert function(*pair)[0] == pytest.approx(table[len(a) - 1, len(b) - 1], abs=1e-9)


@quick
@given(pair=pairs)
def test_multimatch_takes_a_cheapest_way(pair):
    """The summed cost along the way taken is what a shortest-path search finds."""
    from scipy.sparse import lil_matrix
    from scipy.sparse.csgraph import dijkstra

    from saccade.gaze.metrics import alignment, sequences
    from saccade.gaze.metrics.vectors import saccades

    if min(map(len, pair)) < 3:
        return
    sets = [ScanpathSet.from_paths([path]) for path in pair]
    (chunk,) = sequences.chunks(*(saccades(s, None, "nan") for s in sets))
    found = alignment.warp(chunk, lambda a, b: alignment.distance(a[:2], b[:2]), start_free=True, moves=True)
    rows, columns, inside = (part[:, 0] for part in alignment.trace(found))
    cost = alignment.distance(chunk.first[:2, :, None], chunk.second[:2, None])[..., 0]
    way = [*zip(rows[inside], columns[inside], strict=True)]
    assert way[0] == (cost.shape[0] - 1, cost.shape[1] - 1)
    assert way[-1] == (0, 0)
    n, m = cost.shape
    graph = lil_matrix((n * m, n * m))
    for i in range(n):
        for j in range(m):
            for down, right in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
                if down < n and right < m:
                    graph[i * m + j, down * m + right] = cost[down, right] + 1e-12  # a cost of 0 is an edge too
    expected = dijkstra(graph.tocsr(), indices=0)[-1]
    assert sum(cost[cell] for cell in way[:-1]) == pytest.approx(expected, abs=1e-6)


@quick
@given(pair=pairs, seed=st.integers(0, 9))
def test_sequence_score_does_not_depend_on_the_names_of_objects(pair, seed):
    names = np.random.default_rng(seed).permutation(12)
    cells = [(path.x // 200 + 4 * (path.y // 200)).astype(int) for path in pair]
    one, other = (
        [Scanpath("a", path.x, path.y, objects=table[cell]) for path, cell in zip(pair, cells, strict=True)]
        for table in (np.arange(12), names)
    )
    assert gm.object_sequence_score(*one) == gm.object_sequence_score(*other)
    assert gm.object_edit_distance(*one) == gm.object_edit_distance(*other)
    longest = max(map(len, pair))
    assert gm.object_edit_distance(*one)[0] >= longest * (1 - gm.object_sequence_score(*one)[0]) - 1e-9


@pytest.mark.parametrize(
    ("shorter", "longer"), [(1, 1), (8, 9), (9, 8), (16, 40), (33, 64), (64, 64), (64, 65), (65, 70)]
)
@pytest.mark.parametrize("labels", [2, 30, 1000])
def test_strings_in_words_and_in_tables_are_the_recurrence(shorter, longer, labels):
    """Word sizes and the table behind them meet at 8, 16, 32 and 64 labels; pairs of all lengths go in one call."""
    rng = np.random.default_rng(shorter + labels)
    strings = [rng.integers(0, labels, rng.integers(1, size + 1)) for size in (shorter, longer) * 3]
    strings[:2] = [rng.integers(0, labels, size) for size in (shorter, longer)]
    paths = ScanpathSet.from_paths(
        [Scanpath("a", np.zeros(len(s)), np.zeros(len(s)), objects=s, sample=n) for n, s in enumerate(strings)]
    )
    i, j = np.indices((6, 6)).reshape(2, -1)
    common = [
        literal_alignment(strings[a], strings[b], lambda x, y: float(x == y), 0.0) for a, b in zip(i, j, strict=True)
    ]
    edits = [
        -literal_alignment(strings[a], strings[b], lambda x, y: -float(x != y), -1.0) for a, b in zip(i, j, strict=True)
    ]
    longest = np.maximum(paths.lengths[i], paths.lengths[j])
    assert (gm.object_sequence_score(paths.take(i), paths.take(j)) * longest).round(9).tolist() == common
    assert gm.object_edit_distance(paths.take(i), paths.take(j)).tolist() == edits


def test_order_matters_where_it_should():
    forth = make([(100, 100, 0.2), (400, 300, 0.2), (700, 500, 0.2), (100, 500, 0.2)])
    back = make([(100, 500, 0.2), (700, 500, 0.2), (400, 300, 0.2), (100, 100, 0.2)])
    for name in ("hausdorff", "eyenalysis"):
        assert DISTANCES[name](forth, back)[0] == 0
    for name in ("dtw", "frechet", "sed"):
        assert DISTANCES[name](forth, back)[0] > 0
    assert gm.recurrence(forth, back)[0, 0] == gm.recurrence(forth, forth)[0, 0]
    assert gm.recurrence(forth, forth)[0, 1] == 100
    assert gm.recurrence(forth, back)[0, 1] == 0


def test_multimatch_of_short_paths_and_zero_durations():
    short, longer = make([(10, 10, 0.2), (90, 90, 0.2)]), make([(10, 10, 0.0), (90, 90, 0.0), (40, 10, 0.1)])
    assert np.isnan(gm.multimatch(short, longer)).all()
    assert np.isfinite(gm.multimatch(short, longer, short="pad")).all()
    assert gm.multimatch(longer, longer)[0, 4] == 1
    still = make([(5, 5, 0.2)] * 4)
    assert gm.multimatch(still, still).tolist() == [[1.0] * 5]
    untimed = Scanpath("a", [1, 9, 3], [1, 2, 9], width=WIDTH, height=HEIGHT)
    got = gm.multimatch(untimed, untimed)[0]
    assert got[:4].tolist() == [1.0] * 4
    assert np.isnan(got[4])
    with pytest.raises(DataError, match="duration: unknown; this needs durations"):
        gm.multimatch(untimed, untimed, grouping=gm.Grouping())
    with pytest.raises(ConfigError, match="short is"):
        gm.multimatch(short, short, short="cut")


@pytest.mark.parametrize("count", [3, 4, 9])
def test_grouping_where_the_reference_stops(count):
    """Collinear saccades, whose cosine exceeds 1 by rounding, and paths that shrink to one saccade."""
    line = make([(0.1 * i, 0.3 * i, 0.05) for i in range(count)])
    assert gm.multimatch(line, line, grouping=gm.Grouping()).tolist() == [[1.0] * 5]


def test_fixations_shorter_than_a_bin():
    brief, normal = make([(10, 10, 0.01), (99, 9, 0.01)]), make([(10, 10, 0.2), (99, 9, 0.2)])
    for pair in ((brief, normal), (normal, brief), (brief, brief)):
        assert np.isnan(gm.scanmatch(*pair, bin_s=0.05))
        assert np.isnan(gm.sequence_score(*pair, regions([normal]), bin_s=0.05))
    lasts = [make([(10, 10, seconds)]) for seconds in (0.35, 0.3)]
    assert gm.scanmatch(*lasts, bin_s=0.1)[0] == 3 / 4  # 3.5 bins are 4, half to even, whatever 0.35 / 0.1 is in binary
    assert gm.sequence_score(*lasts, regions(lasts), bin_s=0.05)[0] == 6 / 7


def test_sed_keeps_the_last_column_and_what_is_outside():
    """With 803 px and 5 cells of 160, x = 802 is in the last column, not in the first of the next row."""
    wide = {"width": 803, "height": 600, "duration": None}
    edge = make([(802, 10, 0.1), (-5, 700, 0.1)], **wide)
    inner = make([(799, 10, 0.1), (0, 599, 0.1)], **wide)
    assert gm.string_edit_distance(edge, inner)[0] == 0
    with pytest.raises(DataError, match="too small for 5 cells"):
        gm.string_edit_distance(make([(1, 1, 0.1)], width=4), make([(1, 1, 0.1)], width=4))


def test_needs_are_named():
    unsized = Scanpath("a", [1, 2, 3], [1, 2, 4])
    for function in (gm.scanmatch, gm.multimatch, gm.string_edit_distance, gm.scaled_time_delay_embedding):
        with pytest.raises(DataError, match="width, height: unknown; this needs the image size"):
            function(unsized, unsized)
    with pytest.raises(ConfigError, match="there are 1 and 2"):
        gm.dtw(unsized, ScanpathSet.from_paths([unsized, Scanpath("b", [1], [1])]))
    with pytest.raises(DataError, match="no human path of 'a', None"):
        gm.sequence_score(unsized, unsized, gm.Clusters({}))
    with pytest.raises(DataError, match="no map of labels for 'a'"):
        gm.semantic_sequence_score(unsized, unsized, {})
    with pytest.raises(DataError, match="objects: unknown"):
        gm.object_sequence_score(unsized, unsized)
    for wrong in ({"k": 0}, {"mode": "least"}, {"norm": "l1"}):
        with pytest.raises(ConfigError, match="k >= 1, mode mean or max"):
            gm.time_delay_embedding(unsized, unsized, **wrong)


def test_meanings_are_read_inside_the_map():
    maps = {"a": np.arange(12).reshape(3, 4)}
    inside, outside = Scanpath("a", [0, 3.9], [0, 2.9]), Scanpath("a", [-7, 99], [-0.4, 3])
    assert gm.semantic_sequence_score(inside, outside, maps)[0] == 1
    assert gm.semantic_edit_distance(inside, outside, maps)[0] == 0


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_scikit_learn(seed):
    from sklearn.cluster import MeanShift
    from sklearn.cluster import estimate_bandwidth as reference

    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(centre, 30, (20, 2)) for centre in rng.uniform(50, 550, (4, 2))])
    bandwidth = gm.estimate_bandwidth(points)
    assert bandwidth == pytest.approx(reference(points), rel=1e-12)
    for factor in (0.2, 0.8, 1.8):
        expected = MeanShift(bandwidth=factor * bandwidth).fit(points).cluster_centers_
        np.testing.assert_allclose(gm.mean_shift(points, factor * bandwidth), expected, atol=1e-9)


def test_all_fixations_in_one_place():
    still = make([(5, 5, 0.2)] * 4)
    assert gm.sequence_score(still, still, regions([still]))[0] == 1


def test_long_paths():
    """A thousand fixations against a thousand, exact against the summed legs of equal sequences."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 799, 1000), rng.uniform(0, 599, 1000)
    path = Scanpath("a", x, y, duration=np.full(1000, 0.2), width=WIDTH, height=HEIGHT)
    other = Scanpath("a", x[::2], y[::2], duration=np.full(500, 0.2), width=WIDTH, height=HEIGHT)
    assert gm.multimatch(path, path).tolist() == [[1.0] * 5]
    assert gm.scanmatch(path, other)[0] >= 0.5
    assert gm.dtw(path, other)[0] <= 500 * math.hypot(WIDTH, HEIGHT)


def test_a_million_fixations_in_pairs():
    """Nothing grows with the number of pairs but time, and every pair has its value."""
    count, rng = 50_000, np.random.default_rng(0)
    first, second = (
        ScanpathSet.from_columns(
            np.full(count, 10), rng.uniform(0, 799, 10 * count), rng.uniform(0, 599, 10 * count),
            objects=rng.integers(0, 9, 10 * count), image=np.arange(count), width=WIDTH, height=HEIGHT,
        )
        for _ in range(2)
    )  # fmt: skip
    some = np.array([0, 1, count // 2, count - 1])
    for function in (gm.scanmatch, gm.dtw, gm.string_edit_distance, gm.object_sequence_score):
        values = function(first, second)
        assert values.shape == (count,)
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values[some], function(first.take(some), second.take(some)), rtol=1e-12)


def test_a_million_fixations_in_one_path():
    """What needs a row of the table runs against a short path; what needs a table of all with all says so."""
    count = 10**6
    rng = np.random.default_rng(0)
    long = Scanpath("a", rng.uniform(0, 799, count), rng.uniform(0, 599, count), width=WIDTH, height=HEIGHT)
    short = Scanpath("a", long.x[:3], long.y[:3], width=WIDTH, height=HEIGHT)
    assert gm.hausdorff(long, short)[0] > 0
    for function in (gm.multimatch, gm.hausdorff, gm.recurrence, gm.time_delay_embedding):
        with pytest.raises(DataError, match=r"Pair 0 has .* fixations, too many for one table"):
            function(long, long)
