"""Checks of ``Config``: what a run begins with, and what it leaves."""

from typing import Any

from recbole_simdiff.errors import UserError


def check_start(config: Any) -> None:
    """Refuse settings that contradict ``init_from``, ``epochs_from`` and ``without_users``.

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
    _check_users(config)
    if final["epochs_from"] is not None and "valid" in config.held_out:
        raise UserError(
            f"epochs_from={final['epochs_from']} replaces validation, and eval_args has "
            f"split={final['eval_args']['split']}, which validates. To train on all data give "
            "eval_args={split: {RS: [1, 0, 0]}}",
            keys=("epochs_from", "eval_args"),
        )


def _check_users(config: Any) -> None:
    """Refuse ``without_users`` where something of the users would be left."""
    final = config.final_config_dict
    if not final["without_users"]:
        return
    if config.wraps:
        raise UserError(
            f"without_users=True is not available for {config.name}, whose earlier runs keep "
            "users; the command checkpoint strip writes a checkpoint without them",
            keys=("without_users",),
        )
    for key in ("save_rankings", "show_users"):
        if final[key]:
            raise UserError(
                f"{key}={final[key]} writes of users, whom without_users=True leaves out; set one "
                "of them",
                keys=("without_users", key),
            )
