"""Golden runners of scanpath metrics. Stored durations are milliseconds, positions are taken as they are."""

import csv
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saccade.gaze import ScanpathSet
from saccade.gaze import metrics as gm
from saccade.gaze.metrics.clusters import nearest_centre
from tests.golden.case import Case
from tests.golden.runners import runner

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "gaze"


def path_set(values: Tensor, lengths: Tensor, screen: list[int] | None, **columns) -> ScanpathSet:
    """Make a set of padded ``(P, L, 2 or 3)`` positions and milliseconds; images are numbered."""
    array, counts = values.numpy(), lengths.numpy().astype(int).ravel()
    flat = np.concatenate([row[:n] for row, n in zip(array, counts, strict=True)])
    if array.shape[-1] > 2:
        columns["duration"] = flat[:, 2] / 1000
    if screen is not None:
        columns |= {"width": screen[0], "height": screen[1]}
    columns.setdefault("image", range(len(counts)))
    return ScanpathSet.from_columns(counts, flat[:, 0], flat[:, 1], **columns)


def compare(case: Case, results: dict[str, np.ndarray], prefix: str = "output") -> None:
    """Compare those of the results that are stored."""
    named = {f"{prefix}.{name}": torch.from_numpy(np.asarray(value)) for name, value in results.items()}
    case.compare({name: value.to(case.tensors[name].dtype) for name, value in named.items() if name in case.tensors})


def pair_metric(name: str, a: ScanpathSet, b: ScanpathSet):
    """Compute what a stored name says, parameters in the name included."""
    if name in ("multimatch", "dtw", "hausdorff", "eyenalysis", "scanmatch"):
        return getattr(gm, name)(a, b)
    if name == "frechet_discrete":
        return gm.frechet(a, b)
    if name == "multimatch_grouped":
        return gm.multimatch(a, b, grouping=gm.Grouping(45, 0.3, 100))
    if name == "multimatch_padded4":
        return gm.multimatch(a, b, short="pad")[:, :4]
    if name == "scanmatch_temporal":
        return gm.scanmatch(a, b, bin_s=0.05)
    if found := re.fullmatch(r"scanmatch_(\d+)x(\d+)_t(\d+)_th(\d+)p(\d+)", name):
        columns, rows, ms, whole, tenths = map(int, found.groups())
        return gm.scanmatch(a, b, bins=(columns, rows), bin_s=ms / 1000, threshold=float(f"{whole}.{tenths}"))
    if found := re.fullmatch(r"sed_n(\d+)", name):
        return gm.string_edit_distance(a, b, n=int(found[1]))
    if found := re.fullmatch(r"tde_(?:(frobenius)_)?(mean|hausdorff)_k(\d+)", name):
        mode = {"mean": "mean", "hausdorff": "max"}[found[2]]
        return gm.time_delay_embedding(b, a, k=int(found[3]), mode=mode, norm=found[1] or "mean")
    if name == "stde_similarity":
        return gm.scaled_time_delay_embedding(b, a)
    if name == "stde_distance":
        return gm.scaled_time_delay_embedding(b, a, value="distance")
    if found := re.fullmatch(r"cross_recurrence_r(\d+)", name):
        return gm.recurrence(a, b, radius=int(found[1]))
    raise AssertionError(f"no metric for {name}")


@runner("gaze.metrics_pairs")
def metrics_pairs(case: Case) -> None:
    """Pairs of scanpaths under every pair metric; a is the human path, b the simulated one."""
    screen = case.config["screen"]
    a, b = (path_set(case.tensors[f"input.{side}"], case.tensors[f"input.{side}_len"], screen) for side in "ab")
    stored = case.group("output")
    results = {name: pair_metric(name, a, b) for name in stored}
    if "multimatch_grouped" in results:
        long = np.minimum(a.lengths, b.lengths) >= 3
        assert np.isfinite(results["multimatch_grouped"][long]).all(), "also where the reference crashes"
        crashed = np.isnan(stored["multimatch_grouped"].numpy()) & long[:, None]
        results["multimatch_grouped"] = np.where(crashed, np.nan, results["multimatch_grouped"])
    compare(case, results)


@runner("gaze.saliency_conditional")
def saliency_conditional(case: Case) -> None:
    """Maps at the next fixation, at all fixations, and against maps of fixations."""
    inputs = {name: tensor.numpy() for name, tensor in case.group("input").items()}
    maps, baseline, empirical = inputs["maps"], inputs["baseline"], inputs["empirical_map"]
    following, fixations = inputs["next_fix_xy"][:, None], inputs["fixations_xy"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* do not sum to 1", UserWarning)  # the constant map is 1 / 1024 everywhere
        gains = [gm.information_gain(maps, baseline, where) for where in (following, fixations)]
    compare(
        case,
        {
            "cIG": gains[0],
            "cNSS_unbiased_std": gm.nss(maps, following, unbiased=True),
            "cAUC_hat": gm.auc_trapezoid(maps, following),
            "NSS_population_std": gm.nss(maps, following),
            "AUC_single_positive": gm.auc(maps, following),
            "AUC_uniform_nonfix": gm.auc(maps, fixations),
            "NSS_mean": gm.nss(maps, fixations),
            "IG_bits": gains[1],
            "CC": gm.correlation(maps, empirical),
            "SIM": gm.similarity(maps, empirical),
            "KLDiv": gm.kl_divergence(maps, empirical),
            "KLDiv_MIT": gm.kl_divergence(maps, empirical, regularisation="mit"),
        },
    )


@runner("gaze.multimatch")
def multimatch_segments(case: Case) -> None:
    """Recorded pairs with and without grouping, and the values of the MATLAB toolbox."""

    def segment(number: int, subject: str) -> tuple[Tensor, int]:
        path = SHARED / "studyforrest" / f"segment_{number}_sub-{subject}.tsv"
        rows = list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))
        table = [[float(r["start_x"]), float(r["start_y"]), 1000 * float(r["duration"])] for r in rows]
        return torch.tensor(table, dtype=torch.float64), len(table)

    def paths(numbers: list[int], subject: str, screen: list[int]) -> ScanpathSet:
        tables, lengths = zip(*(segment(number, subject) for number in numbers), strict=True)
        return path_set(torch.nn.utils.rnn.pad_sequence(tables, True), torch.tensor(lengths), screen)

    grouping = gm.Grouping(45, 0.3, 146.8)
    numbers = case.tensors["input.segment"].int().tolist()
    first, second = (paths(numbers, subject, [1280, 720]) for subject in ("01", "19"))
    grouped = gm.multimatch(first, second, grouping=grouping)
    stored = case.tensors["output.multimatch_grouped"].numpy()
    assert np.isfinite(grouped).all(), "the reference crashes where a path is left with one saccade; ours has a value"
    toolbox = paths([10], "19", [720, 1280]), paths([10], "01", [720, 1280])
    name = "matlab_segment10_sub19_vs_sub01_720x1280"
    compare(
        case,
        {
            "multimatch": gm.multimatch(first, second),
            "multimatch_grouped": np.where(np.isnan(stored), np.nan, grouped),
            name: gm.multimatch(*toolbox)[0],
            f"{name}_grouped": gm.multimatch(*toolbox, grouping=grouping)[0],
        },
    )


@runner("gaze.sequence_score")
def sequence_scores(case: Case) -> None:
    """Clusters of each image, labels, and the score matrices of all pairs of viewers."""
    for number, image in enumerate(case.config["images"]):
        paths = path_set(
            case.tensors[f"input.{number}.scanpaths"],
            case.tensors[f"input.{number}.len"],
            [800, 600],
            image=image,
            subject=range(len(case.tensors[f"input.{number}.len"])),
        )
        clusters = gm.fit_clusters(paths)
        region = clusters.regions[image, None]
        labels = np.full(case.tensors[f"output.{number}.labels"].shape, -1.0)
        for row, (start, stop) in enumerate(zip(paths.offsets[:-1], paths.offsets[1:], strict=True)):
            points = np.stack([paths.x[start:stop], paths.y[start:stop]], -1)
            labels[row, : stop - start] = nearest_centre(points, region.centres)
        small = case.tensors["input.segmentation_12x16"].numpy()
        maps = {image: np.kron(small, np.ones((50, 50))).astype(np.int64)}
        viewers = len(paths)
        first, second = (axis.ravel() for axis in np.indices((viewers, viewers)))
        a, b = paths.take(first), paths.take(second)
        scores = {
            "sequence_score": gm.sequence_score(a, b, clusters),
            "sequence_score_first3": gm.sequence_score(a, b, clusters, first=3),
            "edit_distance": gm.fixation_edit_distance(a, b, clusters),
            "sequence_score_time50": gm.sequence_score(a, b, clusters, bin_s=0.05),
            "edit_distance_time50": gm.fixation_edit_distance(a, b, clusters, bin_s=0.05),
            "semantic_sequence_score": gm.semantic_sequence_score(a, b, maps),
            "semantic_edit_distance": gm.semantic_edit_distance(a, b, maps),
        }
        tables = {name: score.reshape(viewers, viewers) for name, score in scores.items()}
        others = tables["sequence_score"][~np.eye(viewers, dtype=bool)]
        compare(
            case,
            {
                **tables,
                "bandwidth": np.array([region.bandwidth]),
                "best_factor": np.array([region.factor]),
                "rates": region.rates,
                "cluster_centers": region.centres,
                "labels": labels,
                "mean_pairwise_ss": np.array([others.mean()]),
            },
            prefix=f"output.{number}",
        )


@runner("gaze.search_efficiency")
def search_efficiency(case: Case) -> None:
    """Steps to the target, curves and ratios per viewer, behaviours, and scores over objects."""
    data = {name: tensor.numpy() for name, tensor in case.group("input").items()}
    images, viewers = data["len"].shape
    lengths = data["len"].astype(int).ravel()
    known = np.arange(data["xy"].shape[2]) < lengths[:, None]
    x, y = (data["xy"][..., axis].reshape(known.shape)[known] for axis in (0, 1))
    objects = data["objects"].reshape(known.shape)[known].astype(int)
    corner, size = data["target_bbox_xywh"][:, :2], data["target_bbox_xywh"][:, 2:]
    columns = {
        "image": np.arange(images),
        "task": data["task_id"].astype(int),
        "target_object": data["target_object"].astype(int),
        "target_box": np.concatenate([corner, corner + size], 1),
        "width": data["image_size"][:, 0],
        "height": data["image_size"][:, 1],
    }
    columns = {name: np.repeat(column, viewers, axis=0) for name, column in columns.items()}
    paths = ScanpathSet.from_columns(lengths, x, y, objects=objects, subject=np.tile(range(viewers), images), **columns)
    of_viewer = [paths.filter(subject=viewer) for viewer in range(viewers)]
    max_step = case.config["max_step"]
    curves = np.stack([gm.target_fixation_probability(part, max_step=max_step) for part in of_viewer])
    rest = gm.target_fixation_probability(paths.filter(subject=range(1, viewers)), max_step=max_step)
    steps = gm.steps_to_target(paths)
    ratios = [np.nanmean(gm.scanpath_ratio(part, max_step=max_step)) for part in of_viewer]
    behaviour = np.stack([gm.behaviour(part) for part in of_viewer]).mean(1)
    multi = behaviour[2:].mean(0)
    following = np.arange(len(paths)).reshape(images, viewers)[:, (np.arange(viewers) + 1) % viewers].ravel()
    later = paths.take(following)
    centre = np.stack([later.objects % 14 * 183 + 91.5, later.objects // 14 * 267 + 133.5])
    centres = ScanpathSet.from_columns(
        later.lengths, *centre, image=range(len(later)), width=later.width, height=later.height
    )
    stored = case.tensors["output.multimatch_object_centres"].numpy()
    padded = gm.multimatch(paths, centres, short="pad")[:, :4]
    compare(
        case,
        {
            "steps_to_target": np.where(np.isinf(steps), 1000, steps).reshape(images, viewers),
            "search_cdf_per_viewer": curves,
            "search_cdf_viewers1to5": rest,
            "cdf_sum_per_viewer": curves.sum(1),
            "prob_mismatch_viewer0_vs_rest": np.array([gm.probability_mismatch(curves[0], rest)]),
            "scanpath_ratio_per_viewer": np.array(ratios),
            "behaviour_gt": behaviour[0],
            "behaviour_single": behaviour[1],
            "behaviour_multi": multi,
            "delta_single": np.array([gm.behaviour_difference(behaviour[1], behaviour[0])]),
            "delta_multi": np.array([gm.behaviour_difference(multi, behaviour[0])]),
            "object_sequence_score": gm.object_sequence_score(later, paths),
            "object_edit_distance": gm.object_edit_distance(later, paths),
            "multimatch_object_centres": np.where(np.isnan(stored), np.nan, padded),
        },
    )
