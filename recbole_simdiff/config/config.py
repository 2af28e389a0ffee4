"""Configuration: RecBole's ``Config`` with our YAML layers, safe parsing, and errors that teach.

Later layers win: RecBole's defaults, ``properties/overall.yaml``,
``properties/model/<Model>.yaml``, ``properties/dataset/<name>.yaml``,
``properties/tuned/<name>/<Model>.yaml``, ``properties/preset/<Model>/<preset>.yaml``,
``--config_files``, ``--key=value``. A model's files come after those of the model it derives from,
DiffuASR's after those of its backbone.
"""

import copy
import difflib
import functools
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config as RecBoleConfig
from recbole.evaluator import metric_types
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import EvaluatorType

from recbole_simdiff.compat import restore_numpy_aliases
from recbole_simdiff.config.checks import _check_eval_args, _interval, _separator, _wanted_type
from recbole_simdiff.config.layers import (
    _SEPARATORS,
    _Loader,
    _plain,
    _whole_number,
    preset_files,
    properties_dir,
    read_yaml,
)
from recbole_simdiff.config.limits import check
from recbole_simdiff.distributed import own_gpu
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.diffuasr import generator as diffuasr
from recbole_simdiff.models.registry import get_model, plugin_models
from recbole_simdiff.modules.rules import is_number

COMMAND_LINE, OVERRIDES, CHECKPOINT = "command line", "overrides", "checkpoint"

# Not a recommender but a way to train one, key ``backbone``, on augmented data.
AUGMENTED = "DiffuASR"

# Keys that RecBole reads without listing them in any of its argument lists or default files.
_UNLISTED_KEYS = {"encoding", "tail_ratio"}

# What follows from the keys a user sets, and what RecBole's transforms write over.
_DERIVED = {"device", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "single_spec", "local_rank"}

_DERIVED |= {"valid_neg_sample_args", "test_neg_sample_args"}

_WRITTEN = {"MASK_INDEX", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS", "INVERSE_ITEM_SEQ"}

# Keys of RecBole that would have no effect here, or a harmful one, and why.
_REFUSED_KEYS = {
    "save_dataset": "data sets are rebuilt from their files, which takes seconds",
    "dataset_save_path": "data sets are rebuilt from their files, which takes seconds",
    "save_dataloaders": "loaders are rebuilt at every start",
    "dataloaders_save_path": "loaders are rebuilt at every start",
    "enable_scaler": "enable_amp uses bfloat16, which needs no gradient scaling",
}

# Keys of RecBole's S3Rec that would join its two stages by a pickled file.
_STAGE_KEYS = ("train_stage", "pre_model_path")

# Where a whole configuration comes from, every value at its default included.
_RESTORED = ("checkpoint", "experiment", AUGMENTED)

_NO_KNOWLEDGE = "models of knowledge graphs, which are not trained here, would read it"

# Keys that RecBole lists and that nothing reads here. They may keep their defaults.
_UNREAD_KEYS = dict.fromkeys(
    (
        "ENTITY_ID_FIELD",
        "HEAD_ENTITY_ID_FIELD",
        "TAIL_ENTITY_ID_FIELD",
        "RELATION_ID_FIELD",
        "alias_of_entity_id",
        "alias_of_relation_id",
        "entity_kg_num_interval",
        "relation_kg_num_interval",
        "kg_reverse_r",
    ),
    _NO_KNOWLEDGE,
) | {
    "POSITION_FIELD": "RecBole reads it nowhere",
    "RATING_FIELD": "no model here reads ratings; threshold and val_interval name their column",
    "loss_decimal_place": "losses are logged with four digits",
    "require_pow": "the models that would read it are not sequential",
    "save_step": "S3Rec's two stages follow each other in one run; every epoch is saved",
}

# How other programs, RecBole among them, call the option for YAML files.
_FILES = ("config_files", "config_file", "config_file_list")

_CHOICES = {
    "train_sampling": ("user_all", "prefix_last", "prefix_all"),
    "learner": ("adam", "adamw", "sgd", "adagrad", "rmsprop"),
    "rm_dup_inter": (None, "first", "last"),  # pandas reads false as: keep neither
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

_PATH = {"/", "\\", "\0"}  # not in names, which become names of files

_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


class Config(RecBoleConfig):
    """RecBole's ``Config`` with our layers; every value knows where it came from.

    Differences from RecBole's: nothing is evaluated, ``sys.argv`` is never read, unknown keys and
    wrong types are refused, ``train_neg_sample_args`` follows the loss, and ``use_gpu: False``
    selects the CPU.

    Attributes:
        name (str): what the user calls the model. ``model`` is the class that is trained, which
            differs for DiffuASR: there it is the backbone.

    Args:
        model (str): name of a model of this package or of RecBole, or DiffuASR.
        dataset (str): name of the data set.
        config_files (Sequence): YAML files, later ones win.
        overrides (Mapping | None): values that win over every file.
        origin (str | Mapping): what the overrides, or each of them, are called in messages.

    Raises:
        UserError: for an unknown key or model, a wrong type, or an impossible value.
    """

    def __init__(
        self,
        model: str,
        dataset: str,
        config_files: Sequence[str | Path] = (),
        overrides: Mapping[str, Any] | None = None,
        origin: str | Mapping[str, str] = OVERRIDES,
    ) -> None:
        self.origin: dict[str, str] = {}
        self._override_origin = origin
        self._given: dict[str, str] = {}
        with self.naming_origins():
            try:
                super().__init__(model, dataset, list(config_files), dict(overrides or {}))
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                NotImplementedError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(str(error)) from error
            self._check_values()

    @contextmanager
    def naming_origins(self) -> Iterator[None]:
        """Within the block, a ``UserError`` that quotes ``key=value`` also says who set the key."""
        try:
            yield
        except UserError as error:
            message, origin = str(error), self.origin | self._given
            keys = dict.fromkeys(re.findall(r"\b(\w+)[=:]", message))
            named = [
                f"{k} from {origin[k]}" for k in keys if k in origin and origin[k] not in message
            ]
            error.args = (f"{message} ({', '.join(named)})" if named else message,)
            raise

    # ------------------------------------------------------------------ RecBole's steps, replaced

    def compatibility_settings(self) -> None:
        """RecBole reads names that NumPy 2 removed; add missing ones only."""
        restore_numpy_aliases()

    def _build_yaml_loader(self) -> type:
        return _Loader

    def _load_config_files(self, file_list: Sequence[str | Path] | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for path in file_list or ():
            content = read_yaml(path)
            merged.update(content)
            self._given.update(dict.fromkeys(content, str(path)))
        return merged

    def _load_variable_config_dict(self, config_dict: dict[str, Any] | None) -> dict[str, Any]:
        origin = self._override_origin
        named = dict.fromkeys(config_dict or {}, origin) if isinstance(origin, str) else origin
        self._given.update(named)
        return {key: _plain(value) for key, value in (config_dict or {}).items()}

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _get_model_and_dataset(self, model: str, dataset: str) -> tuple[str, type, str]:
        for key, value in (("model", model), ("dataset", dataset)):
            if not isinstance(value, str) or not value or value[0] == "." or set(value) & _PATH:
                raise UserError(
                    f"{key}={value!r} must be a name, without / and \\ and a dot in front; "
                    "data_path says where the folders of data sets are"
                )
        self.name = model
        if model == AUGMENTED:
            default = read_yaml(properties_dir() / "model" / f"{AUGMENTED}.yaml")["backbone"]
            model = str(self.external_config_dict.get("backbone", default))
            if model == AUGMENTED:
                raise UserError(f"backbone={model} must be a recommender; {AUGMENTED} trains one")
        return model, get_model(model), dataset

    def _layers(self) -> list[str]:
        """Names whose files are read, in order: base classes, the model, DiffuASR."""
        ours = plugin_models()
        bases = [base.__name__ for base in reversed(self.model_class.__mro__)]
        names = [name for name in bases if name in ours] or [self.model]
        return names if self.name == self.model else [*names, self.name]

    def _update_internal_config_dict(self, file: str | Path) -> dict[str, Any]:
        content = read_yaml(file)
        self.internal_config_dict.update(content)
        self.origin.update(dict.fromkeys(content, self._short(file)))
        return content

    @staticmethod
    def _short(file: str | Path) -> str:
        """``properties/...`` for our files, ``recbole/properties/...`` for RecBole's."""
        parts = Path(os.path.normpath(file)).parts
        if "properties" not in parts:
            return str(file)
        start = len(parts) - 1 - parts[::-1].index("properties")
        ours = Path(os.path.normpath(file)).is_relative_to(properties_dir())
        return "/".join(parts[start:] if ours else ("recbole", *parts[start:]))

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        folder = properties_dir()
        names = self._layers()
        before_data = folder / "model" / f"{names[-1]}.yaml"
        layers = [
            folder / "overall.yaml",
            *(folder / "model" / f"{name}.yaml" for name in names),
            folder / "dataset" / f"{dataset}.yaml",
            *(folder / "tuned" / dataset / f"{name}.yaml" for name in names),
        ]
        for layer in layers:
            if layer.is_file():
                self._update_internal_config_dict(layer)
            if layer == before_data:
                own = set(self.internal_config_dict)
        preset = self.external_config_dict.get("preset", self.internal_config_dict.get("preset"))
        if preset is not None:
            self._load_preset([self.name] if self.name == AUGMENTED else names, preset)
        self._check_keys(own)
        self._check_types()

    def _load_preset(self, names: Sequence[str], preset: Any) -> None:
        """The preset's file of the model or, where it has none of that name, of its base."""
        files = preset_files(names)
        known = ["paper", *sorted(files)]
        if preset not in known:
            raise UserError(
                f"preset={preset!r} ({self._given.get('preset')}) is not one of {', '.join(known)}"
            )
        if preset != "paper":
            self._update_internal_config_dict(files[preset])

    def _get_final_config_dict(self) -> dict[str, Any]:
        final = super()._get_final_config_dict()
        self.origin.update(self._given)
        for key in _SEPARATORS:
            final[key] = _separator(key, final[key])
        if isinstance(final["eval_args"], dict):  # given in part, it keeps the rest of the default
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            _check_eval_args(final["eval_args"])
        if self.origin["load_col"] == "recbole/properties/dataset/sample.yaml":
            # RecBole loads users and items only; a model of sequences needs their order, too.
            item = final["ITEM_ID_FIELD"]
            ready = final["benchmark_filename"] is not None
            order = item + final["LIST_SUFFIX"] if ready else final["TIME_FIELD"]
            needed = (final["USER_ID_FIELD"], item, order)
            final["load_col"] = {"inter": [name for name in needed if name]}
            self.origin["load_col"] = "the fields of user, item and time"
        # RecBole draws negatives by default, and refuses them for CE. Here they are drawn for
        # exactly the models that read them: beside the positives (pair-wise) or as labelled rows.
        sampled = final.get("loss_type") == "BPR" or "PAIRWISE" in str(
            getattr(self.model_class, "input_type", "")
        )
        sampled = sampled or "LABEL_FIELD" in _source(self.model_class)
        if sampled and final.get("train_neg_sample_args") is None:
            final["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}
            self.origin["train_neg_sample_args"] = "the loss of the model"
        if isinstance(suffix := final["additional_feat_suffix"], str):  # as in RecBole's own files
            final["additional_feat_suffix"] = [suffix]
        check(final)
        return final

    def _set_default_parameters(self) -> None:
        """RecBole's, but a copy of ml-100k in ``data_path`` goes before the one RecBole ships."""
        self._data_root = self.final_config_dict["data_path"]
        self._check_metrics()
        super()._set_default_parameters()
        own = os.path.join(self._data_root, self.dataset)
        if os.path.isdir(own):
            self.final_config_dict["data_path"] = own

    def _init_device(self) -> None:
        """CPU, or the GPU of ``gpu_id`` when there is one and ``use_gpu`` is true.

        RecBole overwrites CUDA_VISIBLE_DEVICES at every start and ignores ``use_gpu: False``.
        """
        final = self.final_config_dict
        if "gpu_id" in self._given:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(final["gpu_id"])
        cuda = final["use_gpu"] and torch.cuda.is_available()
        final["device"] = own_gpu() if cuda else torch.device("cpu")
        final["single_spec"], final["local_rank"] = True, 0

    # ------------------------------------------------------------------ checks

    def _check_keys(self, own: set[str]) -> None:
        """Refuse keys that nothing would read.

        Args:
            own (set): keys of the files that do not depend on the data set.
        """
        known = {key for keys in self.parameters.values() for key in keys} | own | _UNLISTED_KEYS
        known |= set(re.findall(r"config\[\"(\w+)\"\]", _source(self.model_class)))
        known -= _DERIVED | _WRITTEN | _UNREAD_KEYS.keys() | set(_FILES)
        for key, source in self._given.items():
            value = self.external_config_dict[key]
            if key in ("model", "dataset"):
                chosen = self.name if key == "model" else self.dataset
                if value != chosen:
                    raise UserError(f"{key}={value!r} ({source}) contradicts --{key}={chosen}")
                continue
            if key in _REFUSED_KEYS and value:
                raise UserError(f"{key} ({source}) is not supported: {_REFUSED_KEYS[key]}")
            if key in _STAGE_KEYS and key in known:
                self._check_stage(key, source)
            default = self.internal_config_dict
            stored = source == CHECKPOINT and (key in default or key in _WRITTEN)
            if key in known or stored or (key in default and value == default[key]):
                continue
            if key in _UNREAD_KEYS:
                raise UserError(f"{key}={value!r} ({source}) has no effect: {_UNREAD_KEYS[key]}")
            near = difflib.get_close_matches(key, [*_FILES, *known], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "."
            if near and near[0] in _FILES:
                hint = "; YAML files are given by config_files."
            raise UserError(
                f"unknown key {key!r} ({source}) for model={self.name}{hint} "
                f"'list --explain --model={self.name}' shows every key"
            )

    def _check_stage(self, key: str, source: str) -> None:
        """Refuse a key of S3Rec's stages, unless both say nothing, as in a stored configuration."""
        given, default = self.external_config_dict, self.internal_config_dict
        if any(k not in given or given[k] != default[k] for k in _STAGE_KEYS):
            raise UserError(
                f"{key}={given[key]!r} ({source}) is not supported: both stages of {self.model} "
                "run in turn here, pretrain_epochs of the first and epochs of the second; "
                "pretrain_epochs=0 trains the second alone. Pickled files (.pth) are never opened"
            )

    def _check_types(self) -> None:
        for key, source in self._given.items():
            default, value = self.internal_config_dict.get(key), self.external_config_dict[key]
            if key.endswith("_inter_num_interval"):
                value = self.external_config_dict[key] = _interval(key, value, source)
            wanted = _wanted_type(key, default, value)
            if wanted:
                raise UserError(
                    f"{key}={value!r} ({source}) must be {wanted}; the default is {default!r} "
                    f"({self.origin.get(key)})"
                )
            if isinstance(default, float) and isinstance(value, int):
                self.external_config_dict[key] = float(value)
            elif isinstance(default, int) and isinstance(value, float):
                self.external_config_dict[key] = int(value)

    def _check_metrics(self) -> None:
        metrics, topk = self.final_config_dict["metrics"], self.final_config_dict["topk"]
        names = [metrics] if isinstance(metrics, str) else metrics
        if not isinstance(names, list) or not names or any(type(n) is not str for n in names):
            raise UserError(f"metrics={metrics} must be names of metrics, e.g. [Hit, NDCG]")
        ranking = sorted(k for k, v in metric_types.items() if v == EvaluatorType.RANKING)
        for name in names:
            if name.lower() not in ranking:
                raise UserError(f"metrics={metrics}: {name!r} is not one of {', '.join(ranking)}")
        cuts = [topk] if isinstance(topk, int) else topk
        if not isinstance(cuts, list) or not cuts or any(type(k) is not int or k < 1 for k in cuts):
            raise UserError(f"topk={topk} must be whole numbers of at least 1, e.g. [5, 10]")
        tail = self.final_config_dict.get("tail_ratio")
        whole = is_number(tail) and tail >= 2 and float(tail).is_integer()
        if tail is not None and not whole and not (is_number(tail) and 0 < tail <= 1):
            raise UserError(
                f"tail_ratio={tail!r} must be a share of the items in (0, 1], those trained on "
                "least, or a whole number from 2 on: items with at most so many training targets"
            )

    def _check_values(self) -> None:
        final = self.final_config_dict
        for key, allowed in _CHOICES.items():
            if key in final and final[key] not in allowed:
                raise UserError(
                    f"{key}={final[key]!r} ({self.origin.get(key)}) is not one of "
                    f"{', '.join(map(str, allowed))}"
                )
        clip = final["clip_grad_norm"]
        if clip is not None and not (
            isinstance(clip, dict)
            and "max_norm" in clip
            and clip.keys() <= {"max_norm", "norm_type"}
            and all(is_number(value) and value > 0 for value in clip.values())
        ):
            raise UserError(
                f"clip_grad_norm={clip} must be like {{max_norm: 1.0}} or {{max_norm: 1.0, "
                "norm_type: 2}, with positive numbers"
            )
        if final["eval_args"]["order"] != "TO":
            raise UserError(
                f"eval_args: order={final['eval_args']['order']!r} must be TO, by time: the models "
                "are sequential"
            )
        metric, _, k = str(final["valid_metric"]).partition("@")
        metrics = [name.lower() for name in final["metrics"]]
        wrong_k = bool(k) if metric.lower() == "gauc" else k not in map(str, final["topk"])
        if metric.lower() not in metrics or wrong_k:
            raise UserError(
                f"valid_metric={final['valid_metric']} ({self.origin.get('valid_metric')}) must be "
                f"one of metrics={final['metrics']} at one of topk={final['topk']}, e.g. "
                f"{final['metrics'][0]}@{final['topk'][0]}"
            )
        if self.model not in plugin_models() and final["train_sampling"] != "prefix_last":
            raise UserError(
                f"train_sampling={final['train_sampling']} is not available for RecBole's own "
                f"{self.model}, which trains on prefixes (prefix_last)"
            )
        self._check_transform()
        groups = final["length_groups"]
        whole = isinstance(groups, list) and all(type(k) is int for k in groups)
        if not whole or sorted({0, *groups}) != [0, *groups]:
            raise UserError(f"length_groups={groups} must be rising whole numbers, e.g. [5, 20]")
        self._check_columns()
        if hasattr(self.model_class, "check_config"):
            self.model_class.check_config(self)
        if self.name == AUGMENTED:
            diffuasr.check_config(self)

        modes = final["eval_args"]["mode"]
        ranked = "test" in self.held_out and modes["test"] == "full"
        if final["save_rankings"] and not ranked and self.origin["save_rankings"] not in _RESTORED:
            raise UserError(
                "save_rankings=True writes ranks of the test among all items, which needs a test "
                f"part and mode: full; eval_args={final['eval_args']}"
            )

    def _check_columns(self) -> None:
        """Refuse labels and weights that the model does not read, and the loss of what it does."""
        final = self.final_config_dict
        kept = {column: f"[{least},inf)" for column, least in (final["threshold"] or {}).items()}
        for key, reads, why in (
            ("threshold", "LABEL_FIELD", f"reads no labels; val_interval={kept} keeps such events"),
            ("preload_weight", "get_preload_weight", "asks for no preloaded weights"),
        ):
            sources = map(_source, self._recommenders())
            given = final[key] and self.origin[key] != CHECKPOINT
            if given and not any(reads in source for source in sources):
                raise UserError(f"{key}={final[key]} has no effect: {self.model} {why}")
        needed = {final["USER_ID_FIELD"], final["ITEM_ID_FIELD"]}
        for names in (final["unused_col"] or {}).values():
            if names == "*" or needed & set(names):
                raise UserError(
                    f"unused_col={final['unused_col']} must not have {', '.join(sorted(needed))}, "
                    "which every model reads"
                )

    def _recommenders(self) -> list[type]:
        """The model and the recommenders that it derives from, but for RecBole's abstract ones."""
        return [
            base
            for base in self.model_class.__mro__
            if issubclass(base, SequentialRecommender) and base is not SequentialRecommender
        ]

    def _check_transform(self) -> None:
        """Refuse transforms whose result the model does not read, and those that mask nothing."""
        final, own = self.final_config_dict, self.internal_config_dict["transform"]
        transform = final["transform"]
        if self.model in plugin_models() and transform is not None:
            raise UserError(
                f"transform={transform} is not available for {self.model}, whose training "
                "batches are not RecBole's"
            )
        allowed = (own,) if own else (None, "inverse_itemseq")
        if transform not in allowed:
            raise UserError(
                f"transform={transform!r} must be {' or '.join(map(str, allowed))} for "
                f"{self.model}, which reads the result of no other"
            )
        length = final["MAX_ITEM_LIST_LENGTH"]
        if transform == "mask_itemseq" and int(final["mask_ratio"] * length) < 1:
            raise UserError(
                f"mask_ratio={final['mask_ratio']} of MAX_ITEM_LIST_LENGTH={length} items masks "
                "none of them; one at least is needed"
            )

    # ------------------------------------------------------------------ reading back

    @property
    def held_out(self) -> tuple[str, ...]:
        """Parts that ``eval_args`` holds out of training: valid, test, both or none."""
        parts = ("valid", "test")
        if self.final_config_dict["benchmark_filename"] is not None:  # the files are the parts
            return parts
        ((way, rule),) = self.final_config_dict["eval_args"]["split"].items()
        if way == "LS":
            return {"valid_only": parts[:1], "test_only": parts[1:]}.get(rule, parts)
        return tuple(name for name, share in zip(parts, rule[1:], strict=True) if share)

    def plain(self) -> dict[str, Any]:
        """The values a user can set, as JSON-ready data; ``Config(**plain)`` restores the rest.

        Returns:
            dict: ``model``, ``dataset`` and ``values``.
        """
        left_out = _DERIVED | _WRITTEN | {"model", "dataset"}
        left_out |= {"gpu_id"}  # which GPU is free is a matter of the machine, not of the run
        values = {k: v for k, v in self.final_config_dict.items() if k not in left_out}
        values["data_path"] = self._data_root
        if values["train_neg_sample_args"].get("distribution") == "none":
            values["train_neg_sample_args"] = None
        return {"model": self.name, "dataset": self.dataset, "values": values}

    @property
    def from_checkpoint(self) -> bool:
        """Whether a checkpoint says what is to be done, which may be anybody's."""
        return CHECKPOINT in self._given.values()

    def known_datasets(self) -> list[str]:
        """Names of the data sets with settings here or with a folder in ``data_path``."""
        settings = {path.stem for path in (properties_dir() / "dataset").glob("*.yaml")}
        return sorted(
            settings | {path.parent.name for path in Path(self._data_root).glob("*/*.inter")}
        )

    def with_seed(self, seed: int) -> "Config":
        """The same configuration with another seed."""
        other = copy.copy(self)
        other.final_config_dict = self.final_config_dict | {"seed": seed}
        return other

    def backbone(self) -> "Config":
        """Of a DiffuASR configuration, that of its backbone alone, every value as it is here."""
        own = read_yaml(properties_dir() / "model" / f"{AUGMENTED}.yaml")
        values = {k: v for k, v in self.plain()["values"].items() if k not in own}
        return Config(self.model, self.dataset, overrides=values, origin=self.name)

    def explain(self) -> list[tuple[str, Any, str]]:
        """(key, effective value, where it came from) of every key, sorted."""
        return [
            (key, self.final_config_dict[key], self.origin[key])
            for key in sorted(self.final_config_dict)
            if key in self.origin
        ]


@functools.cache
def _source(model_class: type) -> str:
    """The text of a class."""
    return inspect.getsource(model_class)
