"""Values that follow from others: columns to load, negative samples, the device."""

import os
from typing import Any

import torch
from recbole.utils import InputType

from recbole_simdiff.config.keys import LABELS, reads
from recbole_simdiff.distributed import local_gpu


def derive_columns(final: dict[str, Any], origin: dict[str, str]) -> None:
    """Set ``load_col`` to users, items and their order where the user gave none.

    RecBole's default loads users and items only; a sequential model also needs their order.

    Args:
        final (dict): the values of a configuration.
        origin (dict): key -> where its value comes from.
    """
    if origin["load_col"] != "recbole/properties/dataset/sample.yaml":
        return
    item = final["ITEM_ID_FIELD"]
    has_sequences = final["benchmark_filename"] is not None
    order = item + final["LIST_SUFFIX"] if has_sequences else final["TIME_FIELD"]
    columns = (final["USER_ID_FIELD"], item, order)
    final["load_col"] = {"inter": [name for name in columns if name]}
    origin["load_col"] = "the fields of user, item and time"


def derive_negatives(config: Any) -> None:
    """Set ``train_neg_sample_args`` for the models that read negatives, and for no others.

    A model of the user's own that reads them is trained on RecBole's batches.

    Negatives are a column beside the positives (pair-wise losses) or rows with a label. RecBole
    draws some by default, and refuses them for CE.

    Args:
        config (Config): with its final values.
    """
    final = config.final_config_dict
    pairs = final.get("MODEL_INPUT_TYPE") == InputType.PAIRWISE
    config.is_plugin = config.is_plugin and not (pairs and config.own)
    sampled = pairs or reads(config.model_class, LABELS)
    if sampled and final.get("train_neg_sample_args") is None:
        final["train_neg_sample_args"] = {
            "distribution": "uniform",
            "sample_num": 1,
            "alpha": 1.0,
            "dynamic": False,
            "candidate_num": 0,
        }
        config.origin["train_neg_sample_args"] = "the loss of the model"


def derive_device(config: Any) -> None:
    """Set ``device``: the GPU of ``gpu_id`` if there is one and ``use_gpu`` is true, else the CPU.

    Args:
        config (Config): with its final values.

    Raises:
        UserError: if there are fewer GPUs than processes.
    """
    final = config.final_config_dict
    if "gpu_id" in config.given:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(final["gpu_id"])
    cuda = final["use_gpu"] and torch.cuda.is_available()
    final["device"] = local_gpu() if cuda else torch.device("cpu")
    final["single_spec"], final["local_rank"] = True, 0
