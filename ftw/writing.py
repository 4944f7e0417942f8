"""The weighted gradient of a decision, residual and AMP scale included: what `apply()` leaves in `p.grad`.

Called by the selector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from ftw.errors import NonFiniteError, RecordingError
from ftw.gradients.recorder import Recorder
from ftw.gradients.replay import replay_gradients
from ftw.modes import all_finite
from ftw.problem import Status
from ftw.routes import Decided


class Writer:
    """Forms gradients, and proves once that parameters without a rule can be served by a rerun.

    Args:
        recorder: of the windows.
        scales_uncovered: whether parameters without a rule get a weighted gradient, from a second backward.
    """

    def __init__(self, recorder: Recorder, *, scales_uncovered: bool) -> None:
        self._recorder = recorder
        self._scales_uncovered = scales_uncovered
        self.proved = False

    @property
    def uncovered(self) -> list[Parameter]:
        """Parameters whose gradient a rerun forms."""
        return list(self._recorder.uncovered) if self._scales_uncovered else []

    def combine(self, decided: Decided, loss_scale: float, scaled: bool) -> dict[Parameter, Tensor]:
        """`sum_i w_i c_i` plus the residual, times the AMP scale, for every parameter that the window reached.

        Raises:
            NonFiniteError: it overflows, and no scaler is there to see it.
            RecordingError: a rerun does not give what was recorded.
        """
        uncovered = self.uncovered
        selection, contributions, members = decided[:3]
        combined: dict[Parameter, Tensor] = {}
        if decided.gradient is not None:
            combined = {p: gradient for p, gradient in decided.gradient.items() if p in self._recorder.parameters}
        elif contributions is not None:
            combined = contributions.combine(selection.weights if members is None else selection.weights[members])
        for p in self._recorder.window.touched - combined.keys():  # reached by candidates that were not chosen
            combined[p] = torch.zeros_like(p)
        owned = {p: g * loss_scale for p, g in combined.items()} if uncovered else {}
        # Where the gradient is that of all processes, so is what nobody owns.
        whole = None if decided.gradient is None else decided.residual
        for p, rest in (self._recorder.residual if whole is None else whole).items():
            combined[p] = combined[p] + rest if p in combined else rest
        if loss_scale != 1.0:
            combined = {p: g * loss_scale for p, g in combined.items()}
        if uncovered:
            combined |= self._replay_uncovered(decided, owned, uncovered, loss_scale)
        if selection.status != Status.OVERFLOW and not scaled and not all_finite(combined.values()):
            raise NonFiniteError(
                "the weighted gradient overflows although every chosen contribution is finite; it was not written; "
                "discard() this step, and lower the loss or the cap."
            )
        return combined

    def _replay_uncovered(
        self, decided: Decided, owned: Mapping[Parameter, Tensor], uncovered: list[Parameter], loss_scale: float
    ) -> dict[Parameter, Tensor]:
        """The weighted gradient of parameters without a rule, once it is shown that the rerun can be trusted."""
        selection = decided.selection
        if not self.proved:
            # With all weights 1 it must be what the trainer's backward made: no other output, no penalty.
            ones = torch.ones_like(selection.weights)
            made = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in uncovered}
            self._require_same(replay_gradients(self._recorder, ones, uncovered), made)
            self.proved = bool(all_finite(made.values()))
        if decided.gradient is not None:
            return {p: decided.gradient[p] * loss_scale for p in uncovered}
        gradients = replay_gradients(self._recorder, selection.weights, [*uncovered, *owned])
        if selection.status != Status.OVERFLOW:
            self._require_same({p: gradients[p] for p in owned}, owned)
        return {p: gradients[p] for p in uncovered}

    def _require_same(self, found: Mapping[Parameter, Tensor], expected: Mapping[Parameter, Tensor]) -> None:
        size = max((float(g.norm()) for g in expected.values()), default=0.0)
        for p, value in expected.items():
            gap = float((found[p] - value).norm())
            if gap > min(1e4 * max(self._recorder.precision, torch.finfo(p.dtype).eps), 0.05) * size:
                raise RecordingError(
                    f"uncovered='scale' runs the chosen rows again, and a gradient of shape {tuple(p.shape)} came out "
                    f"different: by {gap:.3g} of {size:.3g}; the loss must depend on the model through its logits "
                    "(or its first output with rows) alone, without penalties on parameters; choose "
                    "uncovered='ignore', or functional=[...] for the module."
                )
