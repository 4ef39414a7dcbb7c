"""How many clusters there are, and who is in which: average linkage, silhouettes, and a test for one cluster.

Clients are merged bottom up by the mean distance between clusters (UPGMA), which gives a partition for every number of
clusters, with a mean silhouette (Rousseeuw 1987). Some number always has the widest one, also where there is nothing to
separate, and many small clusters have wider ones than few by chance. So each is compared with what is usual for points
of a single Gaussian with the same spectrum, clustered in the same way: the number that is furthest above the usual is
taken (as the gap statistic does, Tibshirani, Walther and Hastie 2001), and that there is one cluster is given up only
if hardly any of these points are as far above it (the idea of SigClust, Liu, Hayes, Nobel and Marron 2008,
"Statistical significance of clustering for high-dimension, low-sample size data"), or if silhouettes are plainly wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from fed.clusters.similarity import Matrix, centred, cosines, distances

Labels = NDArray[np.intp]
"""Shape (n,), numbers from 0 in the order of first appearance."""

SIGNIFICANT: Final = 0.05
"""How likely one cluster may be taken for several: the usual level."""

DRAWS: Final = 59
"""Draws from a single Gaussian: two of them may be as wide at a level of 0.05, (2 + 1)/(59 + 1)."""

PLAIN: Final = 0.5
"""A mean silhouette from which structure is plain ("reasonable", Kaufman and Rousseeuw 1990, Finding Groups in Data,
table 4). The test cannot tell two clusters from one long cloud, which is no harm: clients at its two ends pull in
opposite directions."""

REFINED: Final = 20
"""Most rounds of moving members; three are usual."""

MOST: Final = 12
"""Most clusters that are looked for, where their number is not given."""

MANY: Final = 200
"""Clients above which `DRAWS` is not affordable; 19 draws are the least that can tell at 0.05, if none is as wide."""


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """Who is with whom.

    Attributes:
        labels: Cluster of each.
        silhouette: The mean one, from −1 to 1; 0 for one cluster.
        likely: How likely a silhouette as wide is without clusters; None where it was not asked.
    """

    labels: Labels
    silhouette: float
    likely: float | None = None

    @property
    def count(self) -> int:
        """Clusters."""
        return int(self.labels.max(initial=-1)) + 1


def separate(
    products: Matrix,
    *,
    clusters: int | None = None,
    least: int = 1,
    most: int = MOST,
    significant: float = SIGNIFICANT,
    seed: int = 0,
) -> Separation:
    """Separates updates by the cosines of their inner products, after centring.

    Args:
        products: Inner products, shape (n, n).
        clusters: How many there are; None to find out.
        least: Fewest members of a cluster; smaller ones go to their nearest, if enough clusters are left.
        most: Most clusters looked for.
        significant: Level of the test for one cluster.
        seed: Of its draws.
    """
    n = len(products)
    one = Separation(np.zeros(n, np.intp), 0.0)
    if clusters is not None:
        apart = distances(comparable(products))
        labels = _given(apart, min(clusters, n), least) if n > 1 else one.labels
        labels = refined(1.0 - apart, labels, least) if least > 1 else labels
        return Separation(labels, silhouette(apart, labels))
    if n < max(2 * least, 3):
        return one
    middle = comparable(products)
    partitions = _partitions(distances(middle), least, most)
    widths = np.array([width for _, width in partitions])
    spectrum = np.maximum(np.linalg.eigvalsh(cosines(middle)), 0.0)
    rng = np.random.default_rng([seed, n])
    draws = DRAWS if n <= MANY else max(round(1 / significant) - 1, 1)
    usual = np.empty((draws, len(widths)))
    for row in usual:
        points = rng.standard_normal((n, n)) * np.sqrt(spectrum)
        row[:] = [width for _, width in _partitions(distances(centred(points @ points.T)), least, most)]
    above, mean = widths - usual.mean(0), usual.mean(0)
    highest = int(np.argmax(above))
    # The fewest clusters within a standard deviation of that, as for the gap statistic.
    best = int(np.flatnonzero(above >= above[highest] - usual.std(0)[highest])[0])
    as_far = int(((usual - mean).max(1) >= above[highest]).sum())
    likely = (1 + as_far) / (1 + draws)
    if likely > significant and widths.max() >= PLAIN:
        best = int(np.argmax(widths))
    elif likely > significant or widths[best] <= 0:
        return Separation(one.labels, 0.0, likely)
    labels = refined(cosines(middle), partitions[best][0], least)
    return Separation(labels, silhouette(distances(middle), labels), likely)


def comparable(products: Matrix) -> Matrix:
    """Inner products of updates of length 1, after their mean is subtracted from each.

    What clients have in common tells nothing of groups. It goes away whole only if no update is longer than others:
    clients that take more steps in the same direction would else be on one side of the mean, and the rest on the other.
    """
    return centred(cosines(products))


def silhouette(apart: Matrix, labels: Labels) -> float:
    """The mean silhouette (Rousseeuw 1987), 0 for whoever is alone.

    Args:
        apart: Distances, shape (n, n).
        labels: Clusters, shape (n,), numbered from 0 without gaps.
    """
    return float(silhouettes(apart, labels).mean()) if len(labels) else 0.0


def silhouettes(apart: Matrix, labels: Labels) -> Matrix:
    """(b − a)/max(a, b) of each, shape (n,): a is the mean distance to its own cluster, b to the nearest other one."""
    n, k = len(labels), int(labels.max(initial=-1)) + 1
    if k < 2:
        return np.zeros(n)
    inside = np.eye(k)[labels]
    sizes = inside.sum(0)
    sums = apart @ inside
    every = np.arange(n)
    own = sizes[labels]
    a = sums[every, labels] / np.maximum(own - 1, 1)
    others = sums / sizes
    others[every, labels] = np.inf
    b = others.min(1)
    widest = np.maximum(a, b)
    found: Matrix = np.divide(b - a, widest, out=np.zeros(n), where=(own > 1) & (widest > 0))
    return found


def _partitions(apart: Matrix, least: int, most: int) -> list[tuple[Labels, float]]:
    """Into 2, 3 … clusters, each with its mean silhouette."""
    numbers = list(range(2, min(most, len(apart) - 1) + 1))
    gathered = (gather(apart, labels, least) for labels in _tree(apart, numbers))
    return [(labels, silhouette(apart, labels)) for labels in gathered]


def refined(alike: Matrix, labels: Labels, least: int = 1) -> Labels:
    """Moves each to the cluster whose mean it is nearest to, its own weight left out, until nobody moves.

    Merging bottom up never takes back what it once did; these are steps of spherical k-means (Dhillon and Modha 2001).
    The labels stay as they are if a cluster would fall below `least` members.

    Args:
        alike: Cosines, shape (n, n).
        labels: Clusters, shape (n,), numbered from 0 without gaps.
        least: Fewest members.
    """
    for _ in range(REFINED):
        inside = np.eye(int(labels.max()) + 1)[labels]
        length = np.sqrt(np.maximum(np.einsum("ik,ij,jk->k", inside, alike, inside, optimize=True), 1e-12))
        moved = np.argmax((alike @ inside - inside * np.diag(alike)[:, None]) / length, axis=1)
        if np.bincount(moved, minlength=inside.shape[1]).min() < least or (moved == labels).all():
            break
        labels = np.asarray(moved, np.intp)
    return numbered(labels)


def _given(apart: Matrix, clusters: int, least: int) -> Labels:
    """So many clusters: the first cut that leaves as many once those that are too small, strays, are gathered in."""
    cuts = _tree(apart, list(range(clusters, len(apart) + 1)))
    for labels in cuts:
        gathered = gather(apart, labels, least)
        if gathered.max() + 1 == clusters:
            return gathered
    return cuts[0]


def gather(apart: Matrix, labels: Labels, least: int) -> Labels:
    """Members of clusters that are too small go, one by one, to the nearest that is not; all to one if none is left."""
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= least)
    if len(large) == len(sizes):
        return labels
    if not len(large):
        return np.zeros_like(labels)
    inside = np.equal.outer(labels, large).astype(float)
    nearest = large[np.argmin((apart @ inside) / inside.sum(0), axis=1)]
    return numbered(np.where(sizes[labels] >= least, labels, nearest))


def numbered(labels: NDArray[np.integer]) -> Labels:
    """The same clusters, numbered from 0 in the order of first appearance."""
    _, first, which = np.unique(labels, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.intp)
    place[np.argsort(first)] = np.arange(len(first))
    return np.asarray(place[which], np.intp)


def _tree(apart: Matrix, numbers: list[int]) -> list[Labels]:
    """Clusters by average linkage, so many of them each time."""
    if not numbers:
        return []
    n = len(apart)
    merges = linkage(squareform(apart, checks=False), "average")[:, :2].astype(np.intp)
    labels, cuts = np.arange(n), {n: np.arange(n)}
    wanted = set(numbers)
    for step, (one, other) in enumerate(merges):
        labels[(labels == one) | (labels == other)] = n + step
        if n - 1 - step in wanted:
            cuts[n - 1 - step] = numbered(labels)
    return [cuts[number] for number in numbers]
