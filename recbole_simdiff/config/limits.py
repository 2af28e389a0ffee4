"""Allowed values of each key, for every model: this package's and RecBole's.

``Config`` compares the type of most values with the type of the default. The tables here have what
a default does not show: ranges, sizes beyond any machine, and the form of lists and mappings. Rules
about several keys of one model are in the model's ``check_config``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.rules import (
    Rule,
    at_least,
    is_number,
    positive,
    ratio,
    ratio_above_0,
    whole,
)

LAYERS, WIDTH, STEPS = 1_000, 2**20, 1_000_000


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _numbers(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(test, value))


def _mapping(value: Any, test: Callable[[Any], bool]) -> bool:
    """Whether it is a mapping from names to values that pass the test."""
    return isinstance(value, dict) and all(_text(k) and test(v) for k, v in value.items())


def _or_none(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.condition}, or None")


def _buckets(value: Any) -> bool:
    """Whether it is one entry of ``discretization``."""
    if not isinstance(value, dict) or not value.keys() <= {"method", "bucket"}:
        return False
    equal = value.get("method") == "ED" and whole(1, WIDTH).holds(value.get("bucket"))
    return equal or value.get("method") == "LD"


_a_name = Rule(_text, "be text, and not empty")

_a_label = Rule(
    lambda value: _text(value) or is_number(value), "be text or a number, and not empty"
)

_a_list = Rule(_names, "be a list of names, such as [a, b]")

_a_flag = Rule(lambda value: isinstance(value, bool), "be true or false")

_columns = Rule(
    lambda value: _mapping(value, lambda names: names == "*" or _names(names)),
    "be like {inter: [user_id, item_id]}",
)

_weights = Rule(
    lambda value: (
        at_least(0).holds(value) or (_numbers(value, at_least(0).holds) and len(value) == 2)
    ),
    "be at least 0, or a list of two such numbers",
)


def _table(groups: Iterable[tuple[Rule, str]]) -> dict[str, Rule]:
    return {key: rule for rule, keys in groups for key in keys.split()}


RULES: dict[str, Rule] = _table(
    [
        # ---- training and evaluation
        (whole(1), "epochs train_batch_size eval_batch_size eval_step stopping_step"),
        (whole(0), "show_users worker older_windows pretrain_epochs stopping_updates"),
        (whole(0, 2**32 - 1), "seed"),
        (whole(0, 15), "metric_decimal_place"),
        (positive, "learning_rate tau tau_ratio temperature loss_memory_mb"),
        (at_least(0), "weight_decay"),
        (ratio_above_0, "train_fraction"),
        # ---- columns and files
        (_a_name, "data_path checkpoint_dir valid_metric"),
        (_a_label, "wandb_project mlflow_experiment"),
        (_a_name, "USER_ID_FIELD ITEM_ID_FIELD LABEL_FIELD ITEM_LIST_LENGTH_FIELD item_attribute"),
        (_a_name, "LIST_SUFFIX NEG_PREFIX seq_separator"),
        (_or_none(_a_name), "TIME_FIELD encoding item_title_field item_vectors"),
        (_or_none(_a_name), "init_from epochs_from"),
        (_or_none(_a_list), "alias_of_user_id alias_of_item_id normalize_field"),
        (_or_none(_a_list), "additional_feat_suffix benchmark_filename"),
        (_a_list, "numerical_features selected_features"),
        (_or_none(_a_flag), "normalize_all"),
        (_or_none(_columns), "load_col unload_col unused_col"),
        (
            _or_none(Rule(lambda v: _mapping(v, whole(1).holds), "be like {column: 10}")),
            "seq_len",
        ),
        (
            _or_none(Rule(lambda v: _mapping(v, _text), "be like {column of ids: column}")),
            "preload_weight",
        ),
        (
            _or_none(
                Rule(
                    lambda v: (
                        _mapping(v, is_number) and len(v) == 1 and not math.isnan(*v.values())
                    ),
                    "be like {rating: 3}, with one column and a number",
                )
            ),
            "threshold",
        ),
        (
            _or_none(
                Rule(
                    lambda v: _mapping(v, _buckets),
                    "be like {column: {method: ED, bucket: 10}} or {column: {method: LD}}",
                )
            ),
            "discretization",
        ),
        # ---- sizes of models
        (whole(1, STEPS), "MAX_ITEM_LIST_LENGTH diffusion_steps diffuasr_diffusion_steps"),
        (whole(1, LAYERS), "n_layers num_layers block_num denoiser_layers sunet_res_blocks"),
        (whole(0, LAYERS), "step n_facet n_facet_context n_facet_reranker n_facet_emb"),
        (whole(1, LAYERS), "n_facet_all n_facet_hidden"),
        (whole(-LAYERS, 0), "n_facet_window n_facet_MLP"),
        (whole(0, 1), "context_norm use_proj_bias post_remove_context"),
        (whole(1), "reranker_CAN_NUM"),
        (whole(1, 10_000), "n_samples sampling_seeds"),
        (whole(1, WIDTH), "hidden_size embedding_size inner_size denoiser_inner n_pseudo"),
        (whole(1, WIDTH), "n_heads denoiser_heads sunet_base_channels sunet_groups"),
        (whole(1, WIDTH), "nv nh kernel_size interest_size prototype_size k_interests"),
        (whole(1, WIDTH), "high_order order_len short_item_length topk_factor"),
        (
            Rule(
                lambda v: _numbers(v, lambda n: type(n) is int and 1 <= n <= WIDTH),
                f"be a list of whole numbers of at least 1, at most {WIDTH:,}",
            ),
            "mlp_hidden_size dilations",
        ),
        # ---- ratios and weights in RecBole's models
        (ratio, "hidden_dropout_prob attn_dropout_prob dropout_prob sess_dropout item_dropout"),
        (ratio, "mask_ratio ft_ratio spatial_ratio weight"),
        (ratio_above_0, "global_ratio"),
        (
            Rule(
                lambda v: _numbers(v, ratio.holds) and len(v) == 2,
                "be a list of two numbers in [0, 1]",
            ),
            "dropout_probs",
        ),
        (at_least(0), "initializer_range layer_norm_eps reg_loss_ratio lmd lmd_sem"),
        (at_least(0), "aap_weight mip_weight map_weight sp_weight"),
        (_or_none(_weights), "reg_weight"),
    ]
)


CHOICES: dict[str, tuple[Any, ...]] = {
    "train_sampling": ("user_all", "prefix_last", "prefix_all"),
    "item_vectors_mode": ("init", "frozen", "added"),
    "learner": ("adam", "adamw", "sgd", "adagrad", "rmsprop"),
    "rm_dup_inter": (None, "first", "last"),  # false would make pandas keep none of the duplicates
    "state": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    "hidden_act": ("gelu", "relu", "swish", "tanh", "sigmoid"),
    "loss_type": ("BPR", "CE", "NLL"),  # NLL: SINE alone
    "pooling_mode": ("mean", "max", "sum"),
    "pooling_type": ("average", "max"),
    "pooling_type_layer_1": ("average", "max"),
    "pooling_type_layer_2": ("average", "max"),
    "dnn_type": ("trm", "ave"),
    "contrast": ("us_x", "un", "su", "us", None),
    "sim": ("dot", "cos"),
    "fredom_type": ("us_x", "un", "su", "us", "None", None),
    "weight_mode": ("", "dynamic", "static", "max_logits"),
    "reranker_merging_mode": ("replace", "add"),
    "partition_merging_mode": ("replace", "add", "half"),
}


def check(values: Mapping[str, Any]) -> None:
    """Refuse values that no model can use.

    Args:
        values (Mapping): every key of a configuration.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, value in values.items():
        rule = RULES.get(key)
        if rule is not None and not rule.holds(value):
            raise UserError(f"{key}={value!r} must {rule.condition}", keys=(key,))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be finite", keys=(key,))
