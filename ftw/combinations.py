"""Arguments of the selector that do not go together, each with the reason. Called when it is made."""

from __future__ import annotations

from typing import Any

from ftw.errors import ConfigurationError
from ftw.fidelity import TrustRegion


def refuse_combinations(
    *,
    objective: str,
    geometry: str,
    granularity: str,
    memory_cap: int | None,
    uncovered: str,
    curvature: Any,
    relinearise: bool,
    trust: float | TrustRegion,
    constraints: Any,
    cap: float | None,
    several_targets: bool,
) -> None:
    """Raise `ConfigurationError` where two of the arguments contradict each other; see `Selector` for each."""
    # Of a window that is tokens, or may outgrow its cap, nothing but alignments is at hand.
    alignments_alone = granularity == "token" or memory_cap is not None
    if isinstance(trust, TrustRegion) and objective != "utility":
        raise ConfigurationError(
            f"trust={trust} is given with objective={objective!r}; it acts on objective='utility' only."
        )
    if alignments_alone and (relinearise or curvature != "optimizer"):
        given = "relinearise=True" if relinearise else f"curvature={curvature!r}"
        other = "granularity='token'" if memory_cap is None else "memory_cap"
        raise ConfigurationError(
            f"{given} was given together with {other}; it reads the contributions of whole samples of the whole "
            "window; leave one of the two out."
        )
    if objective == "utility" and geometry == "update":
        raise ConfigurationError(
            "objective='utility' with geometry='update' has no meaning: utility is in nats, the update geometry "
            "is not; choose geometry='curvature' or 'vanilla', or objective='match'."
        )
    if granularity == "token" and (uncovered == "scale" or memory_cap is not None):
        other = "uncovered='scale'" if uncovered == "scale" else "memory_cap"
        raise ConfigurationError(
            f"granularity='token' was given together with {other}, which runs whole rows again; "
            "tokens cannot be run by themselves; use granularity='sample', or leave the other out."
        )
    if objective == "utility" and alignments_alone:
        raise ConfigurationError(
            "objective='utility' was given together with granularity='token' or memory_cap, which choose by "
            "alignment alone; utility needs the offset's part as well; use objective='match'."
        )
    if constraints is not None and cap is not None:
        raise ConfigurationError(
            f"cap={cap} is given together with constraints={constraints!r}, which have their own bounds; give "
            "one of the two."
        )
    if several_targets and alignments_alone:
        raise ConfigurationError(
            "several targets were given together with granularity='token' or memory_cap, which choose by the "
            "alignment with one; pass one target, or leave the other out."
        )
