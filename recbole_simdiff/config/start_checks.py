"""Checks of ``Config``: what a run begins with, and what it leaves."""

from typing import Any

from recbole_simdiff.errors import UserError


def check_start(config: Any) -> None:
    """Refuse settings that contradict ``init_from`` and ``epochs_from``.

    Args:
        config (Config): with its final values.

    Raises:
        UserError: naming the keys, their values and what is allowed.
    """
    final = config.final_config_dict
    for key in ("init_from", "epochs_from"):
        if final[key] is not None and config.wraps:
            raise UserError(
                f"{key}={final[key]} is not available for {config.name}, which has several runs",
                keys=(key,),
            )
    if final["init_from"] is not None and final.get("item_table") is not None:
        raise UserError(
            f"init_from={final['init_from']} and item_table={final['item_table']} both give the "
            "item embeddings; leave one out",
            keys=("init_from", "item_table"),
        )
    if final["epochs_from"] is not None and "valid" in config.held_out:
        raise UserError(
            f"epochs_from={final['epochs_from']} replaces validation, and eval_args has "
            f"split={final['eval_args']['split']}, which validates. To train on all data give "
            "eval_args={split: {RS: [1, 0, 0]}}",
            keys=("epochs_from", "eval_args"),
        )
