"""Filters: which candidates of the pool may keep a weight."""

from ftw.filters.all import All
from ftw.filters.base import Filter
from ftw.filters.greedy import Greedy
from ftw.filters.random import Random
from ftw.filters.threshold import Threshold
from ftw.filters.topk import TopK

__all__ = ["All", "Filter", "Greedy", "Random", "Threshold", "TopK"]
