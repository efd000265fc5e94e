"""The weights of a mixture: what the user wrote → phases of exact fractions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from numbers import Rational, Real
from typing import TypeAlias

from streamshards.errors import OptionInvalid
from streamshards.options import require_int

Number: TypeAlias = int | float | Fraction
Weights: TypeAlias = Mapping[str, Number] | Sequence[tuple[int, Mapping[str, Number]]]


@dataclass(frozen=True, slots=True)
class Phase:
    """The weights from one stream position on (about: see ``plan/mixture.py``, 7)."""

    from_sample: int
    weights: tuple[Fraction, ...]
    """One for each source, in their order; none negative, sum 1."""

    def __post_init__(self) -> None:
        require_int(self.from_sample, name="from_sample", minimum=0)
        if min(self.weights, default=Fraction(0)) < 0 or sum(self.weights) != 1:
            raise OptionInvalid(f"weights={self.weights!r} of a phase must not be negative, and have the sum 1")


def parse_weights(weights: Weights, names: Sequence[str]) -> tuple[Phase, ...]:
    """Return the phases that *weights* asks for.

    Args:
        weights: One weight for each source, of any sum: ``{"web": 0.7, "code": 0.3}``; or, to change them, a list of
            (from_sample, weights), the first from 0, ascending. A float means what it prints: 0.7 is 7/10.
        names: The sources, in order.

    Raises:
        OptionInvalid: An unknown or missing source; a weight that is not a number of at least 0; no weight above 0;
            phases out of order.
    """
    if isinstance(weights, Mapping):
        return (Phase(0, _normalised(weights, names, of="weights")),)
    if not isinstance(weights, (list, tuple)):
        raise OptionInvalid(f"weights={weights!r} must be a dict of weights, or a list of (from_sample, weights)")
    phases = tuple(_phase(number, item, names) for number, item in enumerate(weights))
    require_ascending(phases)
    return phases


def _phase(number: int, item: object, names: Sequence[str]) -> Phase:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Mapping):
        raise OptionInvalid(f"weights[{number}]={item!r} must be a pair (from_sample, weights by source)")
    from_sample = require_int(item[0], name=f"from_sample of weights[{number}]", minimum=0)
    return Phase(from_sample, _normalised(item[1], names, of=f"weights[{number}] (from sample {from_sample:,})"))


def _normalised(weights: Mapping[str, Number], names: Sequence[str], *, of: str) -> tuple[Fraction, ...]:
    unknown = [name for name in weights if name not in names]
    missing = [name for name in names if name not in weights]
    if unknown:
        raise OptionInvalid(f"{of}: there is no source {unknown[0]!r}; the sources are {', '.join(map(repr, names))}")
    if missing:
        raise OptionInvalid(f"{of}: no weight for {missing[0]!r}; write 0 to leave a source out")
    exact = [_exact(weights[name], name=f"{of}: {name!r}") for name in names]
    total = sum(exact)
    if total == 0:
        raise OptionInvalid(f"{of}: at least one weight must be above 0")
    return tuple(weight / total for weight in exact)


def _exact(weight: object, *, name: str) -> Fraction:
    exact = None
    if isinstance(weight, Rational):
        exact = Fraction(int(weight.numerator), int(weight.denominator))
    elif isinstance(weight, Real) and isfinite(weight):
        exact = Fraction(str(weight))
    if exact is None or exact < 0 or type(weight) is bool:
        raise OptionInvalid(f"{name}: weight {weight!r} must be a number of at least 0")
    return exact


def require_ascending(phases: Sequence[Phase]) -> None:
    """Check that there is a phase from sample 0, and that each next one begins later."""
    if not phases or phases[0].from_sample != 0:
        begin = f"from sample {phases[0].from_sample:,}" if phases else "nowhere"
        raise OptionInvalid(f"weights must begin with a phase from sample 0; they begin {begin}")
    for before, after in pairwise(phases):
        if after.from_sample <= before.from_sample:
            raise OptionInvalid(
                f"phases of weights must ascend: from_sample={after.from_sample:,} stands after {before.from_sample:,}"
            )
