"""Where episodes begin: regions of the workspace, and the one that is held out."""

from __future__ import annotations

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

from bitvla.data.check import rules
from bitvla.data.check.rules import Finding
from bitvla.data.check.source import Floats, Source
from bitvla.data.check.tables import Tables
from bitvla.data.lerobot import CONSTANT


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """Episodes by where they begin: the cluster and the place of each on the two main axes."""

    clusters: list[int]
    sizes: list[int]
    axes: list[tuple[float, float]]
    held_out: int
    """The cluster that the split keeps for evaluation."""


def coverage_of(dataset: Source, table: Tables, findings: list[Finding]) -> Coverage | None:
    """Clusters of where episodes begin, in deviations from their task's mean, so that none of them is just a task.

    None where there are not two: of few episodes, of any without a finite state at first, of all from one place.
    """
    keys = [key for key in dataset.vectors if key != "action"]
    episodes = range(len(table.lengths))
    starts = [[part for key in keys if (part := table.starts[key][i]) is not None] for i in episodes]
    if not keys or len(starts) < rules.MIN_SPLIT or any(len(parts) < len(keys) for parts in starts):
        return None
    points = np.stack([np.concatenate(parts) for parts in starts])
    frame = pd.DataFrame(points)
    tasks = dataset.tasks() if "env_task" in dataset.episodes else [""] * len(points)
    # Recoveries begin far from where a robot is switched on; they would be a cluster of their own.
    recoveries = dataset.recoveries()
    usual = np.ones(len(points), bool) if recoveries is None else ~recoveries
    if usual.sum() < rules.MIN_SPLIT:
        usual[:] = True
    by_task = frame.where(pd.Series(usual), axis=0).groupby(np.array(tasks))
    spread = by_task.transform("std")
    relative = ((frame - by_task.transform("mean")) / spread.where(spread > CONSTANT)).fillna(0.0).to_numpy()
    relative = relative[:, relative.any(axis=0)]
    if not relative.shape[1]:
        return None
    labels = _cluster(relative, usual)
    sizes = np.bincount(labels)
    if len(sizes) == 1:
        return None
    findings += [
        rules.THIN_REGION.found(
            subject=f"region {cluster} of the workspace: {rules.named(np.flatnonzero(labels == cluster))}",
            value=f"{sizes[cluster]} of {len(points)} episodes begin there",
            threshold=f"{100 * rules.THIN_CLUSTER:g} %",
        )
        for cluster in np.flatnonzero(sizes < rules.THIN_CLUSTER * len(points))
    ]
    centered = relative - relative.mean(axis=0)
    axes = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    held_out = int(np.argmin(np.abs(sizes / len(points) - rules.HELD_OUT)))
    return Coverage(
        clusters=labels.tolist(), sizes=sizes.tolist(), axes=[(x, y) for x, y in axes.tolist()], held_out=held_out
    )


def _cluster(everything: Floats, usual: NDArray[np.bool_]) -> NDArray[np.int64]:
    """k-means of the usual points, with the number of clusters that the index of Calinski and Harabasz (1974) likes
    best; the others join the nearest.
    """
    points = everything[usual]
    best, labels = -np.inf, np.zeros(len(everything), np.int64)
    most = min(rules.MAX_CLUSTERS, len(points) // 5, len(np.unique(points, axis=0)))
    for count in range(min(rules.MIN_CLUSTERS, most), most + 1):
        try:
            centers, candidate = kmeans2(points, count, minit="++", rng=0, missing="raise")
        except Exception:  # scipy's ClusterError: a cluster stayed empty, so there are fewer
            continue
        within = float(((points - centers[candidate]) ** 2).sum())
        between = float(((centers[candidate] - points.mean(axis=0)) ** 2).sum())
        score = between / max(1, count - 1) / max(within / (len(points) - count), 1e-12)
        if score > best:
            best, labels = score, vq(everything, centers)[0].astype(np.int64)
    return labels
