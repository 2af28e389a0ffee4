"""Configuration: RecBole's ``Config`` with our YAML layers, safe parsing, and errors that teach.

Later layers win: RecBole's defaults, ``properties/overall.yaml``,
``properties/model/<Model>.yaml``, ``properties/dataset/<name>.yaml``,
``properties/tuned/<name>/<Model>.yaml``, ``properties/preset/<Model>/<preset>.yaml``,
``--config_files``, ``--key=value``. A model's files come after those of the model it derives from,
DiffuASR's after those of its backbone. A model of the user's own has its ``defaults`` and the files
beside its code in place of ``properties/model/<Model>.yaml``.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config as RecBoleConfig
from recbole.utils import InputType

from recbole_simdiff.compat import restore_numpy_aliases
from recbole_simdiff.config.checks import (
    check_eval_args,
    check_keys,
    check_metrics,
    check_rankings,
    check_types,
    check_values,
    separator,
)
from recbole_simdiff.config.keys import DERIVED, LABELS, WRITTEN, naming, reads
from recbole_simdiff.config.layers import (
    SEPARATORS,
    PlainLoader,
    plain_value,
    preset_files,
    properties_dir,
    read_yaml,
    short_name,
)
from recbole_simdiff.config.limits import check
from recbole_simdiff.config.lookup import (
    check_name,
    find_backbone,
    find_model,
    host_name,
    layers,
    own_defaults,
)
from recbole_simdiff.distributed import own_gpu
from recbole_simdiff.errors import UserError
from recbole_simdiff.models import own
from recbole_simdiff.models.recbole import RecBoleModel
from recbole_simdiff.models.registry import WRAPPERS
from recbole_simdiff.modules.base import SequentialModel

COMMAND_LINE, OVERRIDES, CHECKPOINT = "command line", "overrides", "checkpoint"


# Where a whole configuration comes from, every value at its default included.
_RESTORED = (CHECKPOINT, "experiment", *WRAPPERS)


class Config(RecBoleConfig):
    """RecBole's ``Config`` with our layers; every value knows where it came from.

    Differences from RecBole's: nothing is evaluated, ``sys.argv`` is never read, unknown keys and
    wrong types are refused, ``train_neg_sample_args`` follows the loss, and ``use_gpu: False``
    selects the CPU.

    Attributes:
        name (str): what the user calls the model. ``model`` is the class that is trained, which
            differs for DiffuASR: there it is the backbone.
        is_plugin (bool): whether ``model`` is trained on this package's batches, and not on
            RecBole's. Of the user's own models those that derive from ``SequentialModel`` are, but
            for those that want negatives.
        model_as_given (str | type): what was given for it; a file's class in full.
        data_root (str): ``data_path`` as it was given, the folder of the data sets' folders.
            ``config["data_path"]`` is that of this data set.
        given (dict): key -> where it was set, of the keys that files and overrides set.
        origin (dict): key -> where its value comes from, of all keys.

    Args:
        model (str | type): name of a model of this package or of RecBole, or DiffuASR; or a model
            of the user's own, see ``get_model``.
        dataset (str): name of the data set.
        config_files (Sequence): YAML files, later ones win.
        overrides (Mapping | None): values that win over every file.
        origin (str | Mapping): what the overrides, or each of them, are called in messages.

    Raises:
        UserError: for an unknown key or model, a wrong type, or an impossible value.
    """

    def __init__(
        self,
        model: str | type,
        dataset: str,
        config_files: Sequence[str | Path] = (),
        overrides: Mapping[str, Any] | None = None,
        origin: str | Mapping[str, str] = OVERRIDES,
    ) -> None:
        self.origin: dict[str, str] = {}
        self._override_origin = origin
        self.given: dict[str, str] = {}
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
            check_values(self)
            self.model_class.check_config(self)
            if self.wraps:
                WRAPPERS[self.name](self)
            check_rankings(self, _RESTORED)

    @contextmanager
    def naming_origins(self) -> Iterator[None]:
        """Within the block, a ``UserError`` also says where the values of its keys came from."""
        try:
            yield
        except UserError as error:
            message, origin = str(error), self.origin | self.given
            named = [
                f"{key} from {origin[key]}"
                for key in dict.fromkeys(error.keys)
                if key in origin and origin[key] not in message
            ]
            if named:
                error.args = (f"{message} ({', '.join(named)})",)
            error.keys = ()  # said once
            raise

    # ------------------------------------------------------------------ RecBole's steps, replaced

    def compatibility_settings(self) -> None:
        """RecBole reads names that NumPy 2 removed; add missing ones only."""
        restore_numpy_aliases()

    def _build_yaml_loader(self) -> type:
        return PlainLoader

    def _load_config_files(self, file_list: Sequence[str | Path] | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for path in file_list or ():
            content = read_yaml(path)
            merged.update(content)
            self.given.update(dict.fromkeys(content, str(path)))
        return merged

    def _load_variable_config_dict(self, config_dict: dict[str, Any] | None) -> dict[str, Any]:
        origin = self._override_origin
        named = dict.fromkeys(config_dict or {}, origin) if isinstance(origin, str) else origin
        self.given.update(named)
        return {key: plain_value(value) for key, value in (config_dict or {}).items()}

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _get_model_and_dataset(
        self, model: str | type, dataset: str
    ) -> tuple[str, type[SequentialModel], str]:
        check_name("dataset", dataset)
        self.model_as_given = model
        if isinstance(model, type) or model not in WRAPPERS:
            found = find_model("model", model, self.from_checkpoint)
            self.name = found.__name__
        else:
            self.name = model
            found = find_backbone(model, self.external_config_dict, self.from_checkpoint)
        return found.__name__, found, dataset

    def _update_internal_config_dict(self, file: str | Path) -> dict[str, Any]:
        content = read_yaml(file)
        self._add_defaults(content, short_name(file, properties_dir()))
        return content

    def _add_defaults(self, content: Mapping[str, Any], origin: str) -> None:
        self.internal_config_dict.update(content)
        self.origin.update(dict.fromkeys(content, origin))

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(host_name(model_class), model_class, dataset)
        self.is_plugin = not issubclass(model_class, RecBoleModel)
        folder = properties_dir()
        names = layers(model_class) + ([self.name] if self.wraps else [])
        self._update_internal_config_dict(folder / "overall.yaml")
        for name in names:
            if (layer := folder / "model" / f"{name}.yaml").is_file():
                self._update_internal_config_dict(layer)
            for values, origin in own_defaults(self.own) if name == model else ():
                self._add_defaults(values, origin)
        if self.own:  # tells RecBole that the loader draws no negatives
            self.internal_config_dict.setdefault("loss_type", "CE")
        without_data = set(self.internal_config_dict)
        files = [
            folder / "dataset" / f"{dataset}.yaml",
            *(folder / "tuned" / dataset / f"{name}.yaml" for name in names),
        ]
        for layer in files:
            if layer.is_file():
                self._update_internal_config_dict(layer)
        preset = self.external_config_dict.get("preset", self.internal_config_dict.get("preset"))
        if preset is not None:
            self._load_preset([self.name] if self.wraps else names, preset)
        check_keys(self, without_data)
        check_types(self)

    def _load_preset(self, names: Sequence[str], preset: Any) -> None:
        """The preset's file of the model or, where it has none of that name, of its base."""
        files = preset_files(names)
        known = ["paper", *sorted(files)]
        if preset not in known:
            raise UserError(
                f"preset={preset!r} ({self.given.get('preset')}) is not one of {', '.join(known)}",
                keys=("preset",),
            )
        if preset != "paper":
            self._update_internal_config_dict(files[preset])

    def _get_final_config_dict(self) -> dict[str, Any]:
        final = super()._get_final_config_dict()
        self.origin.update(self.given)
        for key in SEPARATORS:
            final[key] = separator(key, final[key])
        if isinstance(final["eval_args"], dict):  # given in part, it keeps the rest of the default
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            check_eval_args(final["eval_args"])
        if self.origin["load_col"] == "recbole/properties/dataset/sample.yaml":
            # RecBole loads users and items only; a model of sequences needs their order, too.
            item = final["ITEM_ID_FIELD"]
            ready = final["benchmark_filename"] is not None
            order = item + final["LIST_SUFFIX"] if ready else final["TIME_FIELD"]
            needed = (final["USER_ID_FIELD"], item, order)
            final["load_col"] = {"inter": [name for name in needed if name]}
            self.origin["load_col"] = "the fields of user, item and time"
        if isinstance(suffix := final["additional_feat_suffix"], str):  # as in RecBole's own files
            final["additional_feat_suffix"] = [suffix]
        check(final)
        return final

    def _set_default_parameters(self) -> None:
        """RecBole's, but a copy of ml-100k in ``data_path`` goes before the one RecBole ships."""
        self.data_root = self.final_config_dict["data_path"]
        check_metrics(self)
        super()._set_default_parameters()
        self._draw_negatives()
        folder = os.path.join(self.data_root, self.dataset)
        if os.path.isdir(folder):
            self.final_config_dict["data_path"] = folder

    def _draw_negatives(self) -> None:
        """Negatives for exactly the models that read them.

        They stand beside the positives (pair-wise losses) or are rows with a label. RecBole draws
        some by default, and refuses them for CE.
        """
        final = self.final_config_dict
        pairs = final.get("MODEL_INPUT_TYPE") == InputType.PAIRWISE
        self.is_plugin = self.is_plugin and not (pairs and self.own)
        sampled = pairs or reads(self.model_class, LABELS)
        if sampled and final.get("train_neg_sample_args") is None:
            final["train_neg_sample_args"] = {
                "distribution": "uniform",
                "sample_num": 1,
                "alpha": 1.0,
                "dynamic": False,
                "candidate_num": 0,
            }
            self.origin["train_neg_sample_args"] = "the loss of the model"

    def _init_device(self) -> None:
        """CPU, or the GPU of ``gpu_id`` when there is one and ``use_gpu`` is true.

        RecBole overwrites CUDA_VISIBLE_DEVICES at every start and ignores ``use_gpu: False``.
        """
        final = self.final_config_dict
        if "gpu_id" in self.given:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(final["gpu_id"])
        cuda = final["use_gpu"] and torch.cuda.is_available()
        final["device"] = own_gpu() if cuda else torch.device("cpu")
        final["single_spec"], final["local_rank"] = True, 0

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

    def is_stored(self, key: str) -> bool:
        """Whether a checkpoint gave the value of a key."""
        return self.given.get(key) == CHECKPOINT

    def plain(self) -> dict[str, Any]:
        """The values a user can set, as JSON-ready data; ``Config(**plain)`` restores the rest.

        Returns:
            dict: ``model``, ``dataset`` and ``values``.
        """
        left_out = DERIVED | WRITTEN | {"model", "dataset"}
        left_out |= {"gpu_id"}  # which GPU is free is a matter of the machine, not of the run
        values = {k: v for k, v in self.final_config_dict.items() if k not in left_out}
        values["data_path"] = self.data_root
        if values["train_neg_sample_args"].get("distribution") == "none":
            values["train_neg_sample_args"] = None
        return {"model": self.name, "dataset": self.dataset, "values": values}

    @property
    def wraps(self) -> bool:
        """Whether ``name`` is a method that trains ``model``, its backbone, in several runs."""
        return self.name in WRAPPERS

    @property
    def own(self) -> own.OwnModel | None:
        """What is known of ``model`` if it is one of the user's own."""
        return own.of(self.model_class)

    def identity(self) -> dict[str, Any]:
        """The settings that name a result: ``plain`` without what does not shape it."""
        return naming(self.plain())

    @property
    def from_checkpoint(self) -> bool:
        """Whether a checkpoint says what is to be done, which may be anybody's."""
        return CHECKPOINT in self.given.values()

    def with_seed(self, seed: int) -> "Config":
        """The same configuration with another seed."""
        other = copy.copy(self)
        other.final_config_dict = self.final_config_dict | {"seed": seed}
        return other

    def backbone(self) -> "Config":
        """Of a method around a backbone, that of the backbone alone, every value as it is here."""
        wrapper = read_yaml(properties_dir() / "model" / f"{self.name}.yaml")
        values = {k: v for k, v in self.plain()["values"].items() if k not in wrapper}
        return Config(self.model_class, self.dataset, overrides=values, origin=self.name)

    def explain(self) -> list[tuple[str, Any, str]]:
        """(key, effective value, where it came from) of every key, sorted."""
        return [
            (key, self.final_config_dict[key], self.origin[key])
            for key in sorted(self.final_config_dict)
            if key in self.origin
        ]
