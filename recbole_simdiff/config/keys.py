"""Purpose of each key: a table with one row for each key, and lists derived from it.

Every key that belongs to no model has a row. A model's keys are those of its yaml under
``properties/model/``, of this package or of RecBole. They change the result and are fixed once a
run has begun. A model's key with another purpose also has a row.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """Purpose of a key.

    Attributes:
        shapes_result (bool): another value may give other numbers. If false, the key sets where a
            run happens, or what is shown or stored of it.
        on_resume (bool): it may change when a run is continued: it sets when the run ends, or is
            not stored with the run.
        on_evaluate (bool): it may change when a trained model is evaluated.
        refused (str): why it must be off; empty if it may be on.
        only_at_start (bool): it is read when a run begins, so that a checkpoint without it is
            complete.
        unread (str): why nothing reads it, so that it must keep its default; empty if it is read.
    """

    shapes_result: bool = True
    on_resume: bool = False
    on_evaluate: bool = False
    refused: str = ""
    only_at_start: bool = False
    unread: str = ""


# Fixed once a run has begun; part of the result's identity.
_SETTING = Key()

_MEASURE = Key(on_evaluate=True)

_ENDING = Key(on_resume=True)

# Read when a run begins, and never again.
_START = Key(only_at_start=True)

# Where a run happens, and what it shows or stores.
_OUTPUT = Key(shapes_result=False)

_ANYWHERE = Key(shapes_result=False, on_resume=True, on_evaluate=True)

_TRACKING = Key(shapes_result=False, on_resume=True)

_REBUILT = Key(refused="data sets are rebuilt from their files, which takes seconds")

_LOADER = Key(refused="loaders are rebuilt at every start")

_NO_KNOWLEDGE = Key(unread="only models of knowledge graphs read it, and none is available here")

# In the order in which messages list them.
KEYS: dict[str, Key] = {
    # ---- training
    "seed": _SETTING,
    "reproducibility": _SETTING,
    "epochs": _ENDING,
    "stopping_step": _ENDING,
    "stopping_updates": _ENDING,
    "eval_step": _SETTING,
    "train_batch_size": _SETTING,
    "learner": _SETTING,
    "learning_rate": _SETTING,
    "weight_decay": _SETTING,
    "clip_grad_norm": _SETTING,
    "enable_amp": _SETTING,
    "enable_scaler": Key(refused="enable_amp uses bfloat16, which needs no gradient scaling"),
    "shuffle": _SETTING,
    "transform": _SETTING,
    "train_neg_sample_args": _SETTING,
    "train_sampling": _SETTING,
    "older_windows": _SETTING,
    "train_fraction": _SETTING,
    "loss_memory_mb": _SETTING,
    "preset": _SETTING,
    "init_from": _START,
    "epochs_from": _START,
    # ---- machine
    "data_path": _ANYWHERE,
    "offline": _ANYWHERE,
    "use_gpu": _ANYWHERE,
    "gpu_id": _ANYWHERE,
    "show_progress": _ANYWHERE,
    "eval_batch_size": Key(shapes_result=False, on_evaluate=True),
    "worker": _OUTPUT,
    # ---- evaluation
    "eval_args": _SETTING,
    "repeatable": _SETTING,
    "metrics": _MEASURE,
    "topk": _MEASURE,
    "tail_ratio": _MEASURE,
    "valid_metric": _MEASURE,
    "valid_metric_bigger": _SETTING,
    "length_groups": _MEASURE,
    "metric_decimal_place": _OUTPUT,
    # ---- output
    "checkpoint_dir": _OUTPUT,
    "augmentation_cache": _OUTPUT,
    "save_rankings": Key(shapes_result=False, on_evaluate=True),
    "without_users": _OUTPUT,
    "show_users": _TRACKING,
    "log_wandb": _TRACKING,
    "wandb_project": _TRACKING,
    "log_mlflow": _TRACKING,
    "mlflow_experiment": _TRACKING,
    "item_title_field": _OUTPUT,
    "state": _OUTPUT,
    "save_dataset": _REBUILT,
    "dataset_save_path": _REBUILT,
    "save_dataloaders": _LOADER,
    "dataloaders_save_path": _LOADER,
    "loss_decimal_place": Key(unread="losses are logged with four digits"),
    "save_step": Key(unread="both stages of S3Rec are trained in one run; every epoch is saved"),
    "require_pow": Key(unread="only models that are not sequential read it"),
    # ---- data
    "encoding": _SETTING,
    "field_separator": _SETTING,
    "seq_separator": _SETTING,
    "USER_ID_FIELD": _SETTING,
    "ITEM_ID_FIELD": _SETTING,
    "TIME_FIELD": _SETTING,
    "LABEL_FIELD": _SETTING,
    "NEG_PREFIX": _SETTING,
    "ITEM_LIST_LENGTH_FIELD": _SETTING,
    "LIST_SUFFIX": _SETTING,
    "MAX_ITEM_LIST_LENGTH": _SETTING,
    "RATING_FIELD": Key(
        unread="no model here reads ratings; threshold and val_interval name the column themselves"
    ),
    "POSITION_FIELD": Key(unread="RecBole never reads it"),
    "threshold": _SETTING,
    "seq_len": _SETTING,
    "load_col": _SETTING,
    "unload_col": _SETTING,
    "unused_col": _SETTING,
    "additional_feat_suffix": _SETTING,
    "numerical_features": _SETTING,
    "benchmark_filename": _SETTING,
    "rm_dup_inter": _SETTING,
    "val_interval": _SETTING,
    "filter_inter_by_user_or_item": _SETTING,
    "user_inter_num_interval": _SETTING,
    "item_inter_num_interval": _SETTING,
    "alias_of_user_id": _SETTING,
    "alias_of_item_id": _SETTING,
    "preload_weight": _SETTING,
    "normalize_field": _SETTING,
    "normalize_all": _SETTING,
    "discretization": _SETTING,
    "item_vectors": _SETTING,
    "item_vectors_mode": _SETTING,
    # ---- knowledge graphs
    "ENTITY_ID_FIELD": _NO_KNOWLEDGE,
    "HEAD_ENTITY_ID_FIELD": _NO_KNOWLEDGE,
    "TAIL_ENTITY_ID_FIELD": _NO_KNOWLEDGE,
    "RELATION_ID_FIELD": _NO_KNOWLEDGE,
    "alias_of_entity_id": _NO_KNOWLEDGE,
    "alias_of_relation_id": _NO_KNOWLEDGE,
    "entity_kg_num_interval": _NO_KNOWLEDGE,
    "relation_kg_num_interval": _NO_KNOWLEDGE,
    "kg_reverse_r": _NO_KNOWLEDGE,
}

# Keys that may differ between a run and its continuation.
RESUMABLE_KEYS = tuple(name for name, key in KEYS.items() if key.on_resume)

EVALUATION_KEYS = tuple(name for name, key in KEYS.items() if key.on_evaluate)

# Keys that do not change what a run computes.
NOT_IN_RESULT = frozenset(name for name, key in KEYS.items() if not key.shapes_result)

START_KEYS = frozenset(name for name, key in KEYS.items() if key.only_at_start)

REFUSED = {name: key.refused for name, key in KEYS.items() if key.refused}

UNREAD = {name: key.unread for name, key in KEYS.items() if key.unread}

# Options of a model that are gone, with the only value that they may still have: their default.
RETIRED: dict[str, dict[str, Any]] = {
    "CL4SRec": {"min_count": 0, "min_window": 0},
    "CaDiRec": {"noise_schedule": "sqrt", "z0_scale": 1.0, "cand_exclude_original": False},
    "DiffuASR": {
        "pseudo_max_history": 0,
        "diffuasr_sampler": "ddim",
        "diffuasr_rounding": "cosine",
        "diffuasr_exclude": "none",
    },
    "ECLSR": {"guess": "argmax"},
    "SimDiffRec": {"noise_similarity": "dot"},
}

# Keys that RecBole reads but has in none of its argument lists and default files.
UNLISTED = {"encoding", "tail_ratio"}

# Users cannot set these: keys that follow from others, and (WRITTEN) keys that RecBole's transforms
# overwrite.
DERIVED = {
    "device",
    "MODEL_TYPE",
    "MODEL_INPUT_TYPE",
    "eval_type",
    "single_spec",
    "local_rank",
    "valid_neg_sample_args",
    "test_neg_sample_args",
}

WRITTEN = {"MASK_INDEX", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS", "INVERSE_ITEM_SEQ"}

# Keys by which RecBole's S3Rec passes a pickled file from its first stage to its second.
STAGE_KEYS = ("train_stage", "pre_model_path")

# Names of the option for YAML files in other programs and in RecBole.
FILES = ("config_files", "config_file", "config_file_list")

# RecBole's models that read labels or preloaded weights, and keys that a model reads but does not
# list.
LABELS = {"DIN", "DIEN"}

PRELOADED = {"GRU4RecKG", "KSR"}

UNLISTED_OF_MODEL = {"HRM": {"reg_weight"}}


def reads(model_class: type, readers: Collection[str]) -> bool:
    """Whether a model, or one of its base classes, is one of these readers.

    Args:
        model_class (type): the model.
        readers (Collection): names of models: ``LABELS`` or ``PRELOADED``.
    """
    return any(base.__name__ in readers for base in model_class.__mro__)


def naming(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a result is named after.

    Args:
        plain (Mapping): see ``Config.plain``; may be a stored one.

    Returns:
        dict: the same without the values of ``NOT_IN_RESULT``.
    """
    values = {k: v for k, v in plain["values"].items() if k not in NOT_IN_RESULT}
    return {**plain, "values": values}
