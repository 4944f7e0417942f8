"""A weight solver and a filter for filter-then-weight, registered by entry point."""

from ftw_example_plugin.admm import ADMM
from ftw_example_plugin.cosine import Cosine

__all__ = ["ADMM", "Cosine"]
