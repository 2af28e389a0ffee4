"""Names of the two protocols: which items a user is ranked against."""

from collections.abc import Mapping

KEPT, REMOVED = "history kept", "history removed"

PROTOCOLS = (KEPT, REMOVED)

Metrics = dict[str, float]


def protocol_name(protocol: str, mode: str) -> str:
    """What results call a protocol: with its candidates, where they are drawn.

    Args:
        protocol (str): one of ``PROTOCOLS``.
        mode (str): of ``eval_args``, for validation or for test, e.g. full or uni100.

    Returns:
        str: e.g. "history kept" (all items) or "history kept, 100 uniform negatives".
    """
    kinds = {"uni": "uniform negatives", "pop": "negatives by popularity"}
    return protocol if mode == "full" else f"{protocol}, {mode[3:]} {kinds[mode[:3]]}"


def kept(split: Mapping[str, Metrics]) -> Metrics:
    """Metrics of a split with the history kept, whatever the candidates; empty if it has none."""
    return next((metrics for name, metrics in split.items() if name.startswith(KEPT)), {})
