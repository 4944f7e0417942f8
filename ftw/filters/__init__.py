"""Filters: which candidates of the pool may keep a weight."""

from ftw.filters.all import All
from ftw.filters.base import Filter
from ftw.filters.chain import Chain
from ftw.filters.cluster import Cluster
from ftw.filters.dpp import DPP
from ftw.filters.facility_location import FacilityLocation
from ftw.filters.grad_norm import GradNorm
from ftw.filters.greats import Greats
from ftw.filters.greedy import Greedy
from ftw.filters.ifd import IFD
from ftw.filters.max_loss import MaxLoss
from ftw.filters.omp import OMP
from ftw.filters.opus import Opus
from ftw.filters.quota import Quota
from ftw.filters.random import Random
from ftw.filters.rho_loss import RhoLoss
from ftw.filters.threshold import Threshold
from ftw.filters.topk import TopK

__all__ = [
    "DPP",
    "IFD",
    "OMP",
    "All",
    "Chain",
    "Cluster",
    "FacilityLocation",
    "Filter",
    "GradNorm",
    "Greats",
    "Greedy",
    "MaxLoss",
    "Opus",
    "Quota",
    "Random",
    "RhoLoss",
    "Threshold",
    "TopK",
]
