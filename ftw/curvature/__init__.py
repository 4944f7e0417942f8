"""Models of the target loss's Hessian, for those who do not want the optimizer's own (P^-1)."""

from ftw.curvature.base import Curvature
from ftw.curvature.kronecker import EKFAC, KFAC

__all__ = ["EKFAC", "KFAC", "Curvature"]
