"""Configuration: RecBole's ``Config`` with this package's YAML files, safe parsing and checks.

Values come from layers; a later layer overrides an earlier one: RecBole's defaults,
``properties/overall.yaml``, ``properties/model/<Model>.yaml``, ``properties/dataset/<name>.yaml``,
``properties/tuned/<name>/<Model>.yaml``, ``properties/preset/<Model>/<preset>.yaml``,
``--config_files``, ``--key=value``. The files of a model come after those of its base class, and
DiffuASR's after those of its backbone. A model of the user's own has its ``defaults`` and the files
beside its code in place of ``properties/model/<Model>.yaml``.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole.config import Config as RecBoleConfig

from recbole_simdiff.compat import restore_numpy_aliases
from recbole_simdiff.config.checks import (
    check_keys,
    check_types,
    check_values,
    drop_retired,
    separator,
)
from recbole_simdiff.config.columns import fit_to_file
from recbole_simdiff.config.derived import derive_columns, derive_device, derive_negatives
from recbole_simdiff.config.evaluation_checks import (
    check_eval_args,
    check_metrics,
    check_rankings,
)
from recbole_simdiff.config.keys import DERIVED, WRITTEN, naming
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
from recbole_simdiff.errors import UserError
from recbole_simdiff.models import own
from recbole_simdiff.models.recbole import RecBoleModel
from recbole_simdiff.models.registry import WRAPPERS
from recbole_simdiff.modules.base import SequentialModel

COMMAND_LINE, OVERRIDES, CHECKPOINT = "command line", "overrides", "checkpoint"


# Origins of complete configurations, which also give the values that are at their defaults.
_RESTORED = (CHECKPOINT, "experiment", *WRAPPERS)


class Config(RecBoleConfig):
    """RecBole's ``Config`` with this package's layers; the origin of every value is known.

    Differences from RecBole's: nothing is evaluated, ``sys.argv`` is never read, unknown keys and
    wrong types are refused, ``train_neg_sample_args`` follows the loss, and ``use_gpu: False``
    selects the CPU.

    Attributes:
        name (str): name of the model that the user gave. ``model`` names the class that is
            trained; it differs for DiffuASR only, where it is the backbone.
        is_plugin (bool): whether ``model`` is trained on this package's batches, not on RecBole's.
            Of the user's own models, those that derive from ``SequentialModel`` are, except those
            that need negatives.
        model_as_given (str | type): what was given for it; a file's class in full.
        data_root (str): ``data_path`` as it was given, the parent of the data sets' folders.
            ``config["data_path"]`` is the folder of this data set.
        given (dict): key -> where it was set; keys of files and overrides only.
        origin (dict): key -> where its value comes from; all keys.
        columns_note (str | None): what ``fit_to_file`` replaced, for the log.

    Args:
        model (str | type): name of a model of this package or of RecBole, or DiffuASR; or a model
            of the user's own, see ``get_model``.
        dataset (str): name of the data set.
        config_files (Sequence): YAML files; later ones override earlier ones.
        overrides (Mapping | None): values that override every file.
        origin (str | Mapping): name of the overrides, or of each of them, in messages.

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
        """Within the block, a ``UserError`` also names the origins of its keys' values."""
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
            error.keys = ()  # an enclosing block appends nothing
            raise

    # ------------------------------------------------------------------ RecBole's steps, replaced

    def compatibility_settings(self) -> None:
        """Add the names that NumPy 2 removed; RecBole's own method fails with NumPy 2."""
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
        drop_retired(self, names)
        check_keys(self, without_data)
        check_types(self)

    def _load_preset(self, names: Sequence[str], preset: Any) -> None:
        """Read the preset's file: the model's or, if it has no such preset, its base class's."""
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
        if isinstance(final["eval_args"], dict):  # parts that are not given keep their defaults
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            check_eval_args(final["eval_args"])
        derive_columns(final, self.origin)
        if isinstance(suffix := final["additional_feat_suffix"], str):  # as in RecBole's own files
            final["additional_feat_suffix"] = [suffix]
        check(final)
        return final

    def _set_default_parameters(self) -> None:
        """RecBole's, but a copy of ml-100k in ``data_path`` is used, not the one RecBole ships."""
        self.data_root = self.final_config_dict["data_path"]
        check_metrics(self)
        super()._set_default_parameters()
        derive_negatives(self)
        folder = os.path.join(self.data_root, self.dataset)
        if os.path.isdir(folder):
            self.final_config_dict["data_path"] = folder
        stem = Path(self.final_config_dict["data_path"], self.dataset)
        self.columns_note = fit_to_file(self.final_config_dict, self.origin, stem)

    def _init_device(self) -> None:
        """RecBole's always overwrites CUDA_VISIBLE_DEVICES and ignores ``use_gpu: False``."""
        derive_device(self)

    # ------------------------------------------------------------------ reading back

    @property
    def held_out(self) -> tuple[str, ...]:
        """Parts that ``eval_args`` holds out of training: valid, test, both or none."""
        parts = ("valid", "test")
        if self.final_config_dict["benchmark_filename"] is not None:  # one file for each part
            return parts
        ((method, rule),) = self.final_config_dict["eval_args"]["split"].items()
        if method == "LS":
            return {"valid_only": parts[:1], "test_only": parts[1:]}.get(rule, parts)
        return tuple(name for name, share in zip(parts, rule[1:], strict=True) if share)

    def is_stored(self, key: str) -> bool:
        """Whether a checkpoint gave the value of a key."""
        return self.given.get(key) == CHECKPOINT

    def plain(self) -> dict[str, Any]:
        """The values a user can set, as JSON can hold them; all other values follow from them.

        Returns:
            dict: ``model``, ``dataset`` and ``values``.
        """
        omitted = DERIVED | WRITTEN | {"model", "dataset"}
        omitted |= {"gpu_id"}  # depends on the machine, not on the run
        values = {k: v for k, v in self.final_config_dict.items() if k not in omitted}
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
        """The settings that name a result: ``plain`` without keys that do not change results."""
        return naming(self.plain())

    @property
    def from_checkpoint(self) -> bool:
        """Whether values come from a checkpoint, which somebody else may have made."""
        return CHECKPOINT in self.given.values()

    def with_seed(self, seed: int) -> "Config":
        """The same configuration with another seed."""
        other = copy.copy(self)
        other.final_config_dict = self.final_config_dict | {"seed": seed}
        return other

    def backbone(self) -> "Config":
        """The configuration of the backbone alone, with the values it has here.

        Only for a method that trains a backbone, see ``wraps``.
        """
        method_keys = read_yaml(properties_dir() / "model" / f"{self.name}.yaml")
        values = {k: v for k, v in self.plain()["values"].items() if k not in method_keys}
        return Config(self.model_class, self.dataset, overrides=values, origin=self.name)

    def explain(self) -> list[tuple[str, Any, str]]:
        """(key, effective value, origin) of every key, sorted by key."""
        return [
            (key, self.final_config_dict[key], self.origin[key])
            for key in sorted(self.final_config_dict)
            if key in self.origin
        ]
