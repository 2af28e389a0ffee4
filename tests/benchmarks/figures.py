"""Figures with their limits: what must not get worse unnoticed."""

from typing import NamedTuple


class Limit(NamedTuple):
    """What a figure may be at most, or at least, and what it is."""

    most: float | None
    least: float | None
    meaning: str

    def holds(self, value: float) -> bool:
        """Whether a value is within the limit; NaN is not."""
        return (self.most is None or value <= self.most) and (
            self.least is None or value >= self.least
        )

    def __str__(self) -> str:
        return f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"


LIMITS = {
    "softmax": Limit(1.0, None, "time of the full-softmax loss : torch's dense one"),
    "simdiffrec": Limit(2.2, None, "a SimDiffRec epoch : the encoder's"),
    "cadirec": Limit(3.4, None, "a CaDiRec epoch : the encoder's, both with the full softmax"),
    "encoder to RecBole": Limit(None, 20.0, "an epoch of RecBole's SASRec : the encoder's"),
    "simdiffrec to RecBole": Limit(None, 14.0, "an epoch of RecBole's SASRec : SimDiffRec's"),
    "evaluation": Limit(0.5, None, "full ranking of the test part : RecBole's"),
    "inference, SimDiffRec": Limit(1.15, None, "time of a request : the encoder's"),
    "inference, CaDiRec": Limit(1.15, None, "time of a request : the encoder's"),
    "inference, SASRecCE": Limit(1.2, None, "time of a request : RecBole's SASRec"),
    "approximate step": Limit(0.5, None, "s a SimDiffRec step, 1.2 M items, 256 rows of 6"),
    "approximate memory": Limit(3.0, None, "GiB over the start, the same step"),
    "large memory": Limit(24.0, None, "GiB, a SimDiffRec step with 12 M items"),
}


class Figures:
    """The figures of a run of the benchmarks."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.limits: dict[str, Limit] = {}

    def keep(self, name: str, value: float, limit: Limit | None = None) -> None:
        """Note a figure; its limit is that of ``LIMITS``, unless it is given."""
        self.values[name], self.limits[name] = value, limit or LIMITS[name]

    def missed(self) -> list[str]:
        """Names of the figures that are not within their limits."""
        return [name for name, value in self.values.items() if not self.limits[name].holds(value)]

    def table(self) -> str:
        """A line for each figure."""
        missed = self.missed()
        return "\n".join(
            f"    {'MISSED' if name in missed else 'ok':<6} {name:<30} {value:8.2f}, "
            f"{self.limits[name]} ({self.limits[name].meaning})"
            for name, value in self.values.items()
        )
