"""Keep the record of a finished run, without weights and paths, for the tables.

    python docs/results/keep.py saved/<run> NAME "label of its row" "--model=... its arguments"

writes ``runs/NAME.json``: metrics, settings, versions and the log of every epoch. ``rows.txt`` says
where the row stands.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATHS = ("data_path", "checkpoint_dir", "augmentation_cache", "baseline_checkpoint", "item_table")


def main(run: str, name: str, row: str, arguments: str) -> None:
    """Write the record."""
    result = json.loads(Path(run, "result.json").read_text())
    path = HERE / "runs" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record(result, row, arguments), indent=1) + "\n")
    print(path)


def record(result: dict[str, Any], row: str, arguments: str) -> dict[str, Any]:
    """What is kept of a ``result.json``.

    Args:
        result (dict): its content.
        row (str): label in tables.
        arguments (str): what the run was started with.
    """
    values = result["config"]["values"]
    reached = result["epochs"] >= values["epochs"]
    kept = {"row": row, "arguments": arguments, "ended": "epochs" if reached else "patience"}
    left_out = {"run_dir", "config", "augmentation"}
    kept |= {key: value for key, value in result.items() if key not in left_out}
    settings = {key: value for key, value in values.items() if key not in PATHS}
    return kept | {"config": {**result["config"], "values": settings}}


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
