"""TAGCOS: contributions that are alike form clusters, and each cluster sends its share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftw.arguments import one_of
from ftw.errors import ConfigurationError
from ftw.filters.base import Filter
from ftw.filters.subpool import inner_filter, subproblem
from ftw.problem import SelectionProblem


class Cluster(Filter):
    """Groups the pool by distance of contributions, gives each cluster a share of k, and picks within clusters.

    The distance is `||c_i - c_j||_M`; clusters come from Ward's method, the agglomerative form of the k-means
    objective, which needs no random start. A cluster of size m may send `k m / n`, rounded by largest remainder. What
    it sends is decided by another filter, which sees the cluster as its pool; where that returns fewer, fewer come.
    Order: the first of every cluster, then the second, larger clusters before smaller ones.

    Source: Zhang et al. 2024, "TAGCOS: task-agnostic gradient clustered coreset selection for instruction tuning data",
    section 3. There the clusters are of k-means, 100 of them, on Adam's projected features, and within each an
    orthogonal matching pursuit approximates the cluster's mean. That is `Cluster(within="omp", towards="centroid")`.
    Deviations: Ward's method in the place of Lloyd's; contributions under M; and by default the alignment with the
    target decides within a cluster, the target being what is known here and not there.

    Cost: all of K, or the factor where the problem has one, and O(n^2) time and memory for the clusters.

    Args:
        clusters: how many at most, at least 1; None: the root of k, rounded up.
        within: name, class or instance of the filter that picks within a cluster.
        towards: "target": b is that of the problem; "centroid": b is the mean column of K over the cluster, so that the
            cluster's mean contribution is what is approached.

    Raises:
        ConfigurationError: an argument is not allowed, or `within` ignores budgets.
    """

    needs_gram = True

    def __init__(self, clusters: int | None = None, within: Any = "topk", towards: str = "target") -> None:
        if clusters is not None and (isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1):
            raise ConfigurationError(
                f"clusters is {clusters!r}; an integer of at least 1 is needed; leave it out for the root of k."
            )
        one_of("towards", towards, ("target", "centroid"))
        self.clusters, self.towards = clusters, towards
        self.within = inner_filter(within, "cluster")
        self.columns = self.within.columns

    def __call__(self, problem: SelectionProblem) -> Tensor:
        k = problem.budget
        if not k:
            return torch.zeros(0, dtype=torch.long)
        labels = _ward(problem, self.clusters or math.ceil(math.sqrt(k)))
        members = [np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())]
        members.sort(key=len, reverse=True)  # stable: equal sizes by their first member
        shares = _shares(np.array([len(each) for each in members]), k)
        ranked: list[tuple[int, int, int]] = []  # rank within the cluster, cluster, candidate
        for cluster, (index, share) in enumerate(zip(members, shares.tolist(), strict=True)):
            part = torch.from_numpy(index)
            alignment = problem.gram_block(part).mean(1) if self.towards == "centroid" else None
            picked = part[self.within(subproblem(problem, part, share, alignment))].tolist()
            ranked += [(rank, cluster, candidate) for rank, candidate in enumerate(picked)]
        return torch.tensor([candidate for _, _, candidate in sorted(ranked)], dtype=torch.long)


def _ward(problem: SelectionProblem, clusters: int) -> NDArray[np.int64]:  # (n,) labels
    n = problem.size
    if clusters >= n or clusters == 1:
        return np.arange(n) if clusters >= n else np.zeros(n, dtype=np.int64)
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    if problem.factor is not None and problem.factor.numel():
        F = problem.factor.numpy()
        tree = linkage(pdist(F / (np.abs(F).max() or 1.0)), "ward")
    else:
        K, squares = problem.full_gram.numpy(), problem.diagonal.numpy()
        both = squares[:, None] + squares
        apart = (both - 2 * K)[np.triu_indices(n, 1)]
        apart[apart < _ROUNDING * both[np.triu_indices(n, 1)]] = 0.0
        tree = linkage(np.sqrt(apart / (squares.max() or 1.0)), "ward")
    return np.asarray(fcluster(tree, clusters, "maxclust"), dtype=np.int64)


_ROUNDING = 1e-12
"""Part of the terms of a squared distance that is taken for rounding of their difference."""


def _shares(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """`total` split in proportion to sizes, to whole numbers by largest remainder, ties to the earlier."""
    exact = total * sizes  # in units of 1 / sum(sizes): whole numbers, so that ties are ties
    shares: NDArray[np.int64] = exact // sizes.sum()
    order = np.argsort(-(exact % sizes.sum()), kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return shares
