"""What each key is for: one row a key, and the lists of keys that follow from the rows.

Every key that is not a model's own has a row. A model's own keys are those of its yaml under
``properties/model/``, RecBole's or this package's; they shape the result and are fixed once a run
has begun. Where such a key is for something else, it has a row, too.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """What a key is for.

    Attributes:
        shapes_result (bool): another value may give other numbers. Else it says where a run
            happens, or what is shown or kept of it.
        on_resume (bool): it can be changed when a run is continued: it says when the run ends, or
            what is not stored with the run.
        on_evaluate (bool): it can be changed when a trained model is evaluated.
        refused (str): why it must be off.
        unread (str): why nothing reads it, so that it must keep its default.
    """

    shapes_result: bool = True
    on_resume: bool = False
    on_evaluate: bool = False
    refused: str = ""
    unread: str = ""


# Fixed once a run has begun; part of what the result is named after.
_SETTING = Key()

_MEASURE = Key(on_evaluate=True)

_ENDING = Key(on_resume=True)

# Where a run happens, and what it shows or keeps.
_OUTPUT = Key(shapes_result=False)

_ANYWHERE = Key(shapes_result=False, on_resume=True, on_evaluate=True)

_TRACKING = Key(shapes_result=False, on_resume=True)

_REBUILT = Key(refused="data sets are rebuilt from their files, which takes seconds")

_LOADER = Key(refused="loaders are rebuilt at every start")

_NO_KNOWLEDGE = Key(unread="models of knowledge graphs, which are not trained here, would read it")

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
    # ---- machine
    "data_path": _ANYWHERE,
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
    "save_step": Key(
        unread="S3Rec's two stages follow each other in one run; every epoch is saved"
    ),
    "require_pow": Key(unread="the models that would read it are not sequential"),
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
        unread="no model here reads ratings; threshold and val_interval name their column"
    ),
    "POSITION_FIELD": Key(unread="RecBole reads it nowhere"),
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

# What may differ between a run and its continuation: when it ends, and nothing else in its numbers.
RESUMABLE_KEYS = tuple(name for name, key in KEYS.items() if key.on_resume)

EVALUATION_KEYS = tuple(name for name, key in KEYS.items() if key.on_evaluate)

# Keys that change where a run happens or what is shown, not what it computes.
NOT_IN_RESULT = frozenset(name for name, key in KEYS.items() if not key.shapes_result)

REFUSED = {name: key.refused for name, key in KEYS.items() if key.refused}

UNREAD = {name: key.unread for name, key in KEYS.items() if key.unread}

# Options of a model that are gone, with the only value that they may still have: their default.
RETIRED: dict[str, dict[str, Any]] = {
    "CL4SRec": {"min_count": 0, "min_window": 0},
    "CaDiRec": {"noise_schedule": "sqrt", "z0_scale": 1.0, "cand_exclude_original": False},
    "ECLSR": {"guess": "argmax"},
    "SimDiffRec": {"noise_similarity": "dot"},
}

# Keys that RecBole reads without listing them in any of its argument lists or default files.
UNLISTED = {"encoding", "tail_ratio"}

# No user sets them: what follows from other keys, and what RecBole's transforms write over.
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

# Keys of RecBole's S3Rec that would join its two stages by a pickled file.
STAGE_KEYS = ("train_stage", "pre_model_path")

# How other programs, RecBole among them, call the option for YAML files.
FILES = ("config_files", "config_file", "config_file_list")

# What RecBole's models read beyond users, items and times, and beyond the keys they list.
LABELS = {"DIN", "DIEN"}

PRELOADED = {"GRU4RecKG", "KSR"}

UNLISTED_OF_MODEL = {"HRM": {"reg_weight"}}


def reads(model_class: type, readers: Collection[str]) -> bool:
    """Whether a model, or one that it derives from, is among the readers of something.

    Args:
        model_class (type): the model.
        readers (Collection): ``LABELS`` or ``PRELOADED``.
    """
    return any(base.__name__ in readers for base in model_class.__mro__)


def naming(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration, what a result is named after.

    Args:
        plain (Mapping): see ``Config.plain``; today's or a stored one.

    Returns:
        dict: the same without the values of ``NOT_IN_RESULT``.
    """
    values = {k: v for k, v in plain["values"].items() if k not in NOT_IN_RESULT}
    return {**plain, "values": values}
