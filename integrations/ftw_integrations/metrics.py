"""What a trainer logs of its selections: means over the steps since the last log. No trainer is imported here."""

from __future__ import annotations

import math

from ftw import Selection, Status

PREFIX = "ftw/"

_DIAGNOSTICS = ("effective_sample_size", "relative_residual", "kkt_residual", "first_order", "curvature", "quarantined")


class Metrics:
    """Sums of figures by name, until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, selection: Selection) -> None:
        """Count a step. What is not finite, as in a step that overflowed, is left out of its mean."""
        figures = {name: selection.diagnostics.get(name, math.nan) for name in _DIAGNOSTICS}
        figures |= {
            "predicted_drop": selection.predicted_drop,
            "candidates": len(selection.weights),
            "chosen": len(selection.indices),
            "largest_weight": float(selection.weights.max()),
            "nothing_useful": selection.status == Status.NOTHING_USEFUL,
            "overflow": selection.status == Status.OVERFLOW,
        }
        for name, value in figures.items():
            number = float(len(value) if isinstance(value, list | tuple) else value)
            if math.isfinite(number):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + number, count + 1

    def take(self) -> dict[str, float]:
        """The means, by prefixed name; counting begins anew."""
        means = {PREFIX + name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means
