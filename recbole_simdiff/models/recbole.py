"""RecBole's own models under this package's contract, and what their code does not check.

A model of RecBole becomes a class of the same name with ``SequentialModel``'s methods in front of
its own. Modules, buffers, initial weights and scores stay RecBole's.
"""

import contextlib
import functools
import io
import traceback
from pathlib import Path
from typing import Any

from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.loss import BPRLoss
from torch import Tensor, nn

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.plan import Phase


class RecBoleModel(SequentialModel):
    """The contract's defaults, for a model of RecBole."""


class TwoStageModel(RecBoleModel):
    """S3Rec. RecBole runs it as two programs joined by a file; here two phases follow each other.

    Attributes:
        mask_token (int): RecBole counts it among the items; its row is the last one.
        train_stage (str): tells its loss the stage; it is built for the first one.
    """

    n_extra_tokens = 1
    item_embedding: nn.Embedding
    loss_fct: nn.Module
    mask_token: int
    train_stage: str

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.pretrain_epochs: int = config["pretrain_epochs"]
        self.pairwise: bool = config["loss_type"] == "BPR"

    def training_plan(self) -> list[Phase]:
        """Pretraining, if it has epochs, and the next-item loss."""
        tuned = Phase("finetune", self.epochs)
        if not self.pretrain_epochs:
            return [tuned]
        return [Phase("pretrain", self.pretrain_epochs, evaluate=False), tuned]

    def begin_epoch(self, phase: str, epoch: int) -> None:
        """What RecBole does when it constructs the model for that stage."""
        self.train_stage = phase
        if phase == "pretrain":
            self.loss_fct = nn.BCEWithLogitsLoss(reduction="none")
        else:
            self.loss_fct = BPRLoss() if self.pairwise else nn.CrossEntropyLoss()

    @property
    def item_table(self) -> Tensor:
        """Embeddings of padding and all items, without the mask token, [n_items, H]."""
        return self.item_embedding.weight[: self.mask_token]


class AppendedMaskModel(RecBoleModel):
    """BERT4Rec. It appends its mask to a sequence and then drops the oldest item."""

    n_extra_tokens = 1
    n_dropped_items = 1


_FACES: dict[str, type[RecBoleModel]] = {"S3Rec": TwoStageModel, "BERT4Rec": AppendedMaskModel}


@functools.cache
def adapted(model: type[SequentialRecommender]) -> type[RecBoleModel]:
    """A model of RecBole with the methods of ``SequentialModel``; always the same class.

    It has the name, module and documentation of RecBole's class, so its source is found.
    """
    faces = [_FACES[base.__name__] for base in model.__mro__ if base.__name__ in _FACES]
    face = faces[0] if faces else RecBoleModel
    names = {"__module__": model.__module__, "__qualname__": model.__qualname__}
    return type(model.__name__, (face, model), {**names, "__doc__": model.__doc__})


def build_recbole(config: Any, dataset: Any) -> RecBoleModel:
    """A model of RecBole, whose code does not say which setting it cannot use.

    Raises:
        UserError: if it refuses its settings, or reads more of the data than is loaded.
    """
    check_features(config, dataset)
    n_items = dataset.item_num - 1
    if config["reranker_CAN_NUM"] and config["reranker_CAN_NUM"] > n_items:
        raise UserError(
            f"reranker_CAN_NUM={config['reranker_CAN_NUM']} candidates must not exceed the "
            f"{n_items} items there are",
            keys=("reranker_CAN_NUM",),
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # FEARec prints its frequencies
            model: RecBoleModel = config.model_class(config, dataset)
            return model
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model={config['model']} cannot be built for dataset={config['dataset']!r}: {error}. "
            f"Columns that it reads, if they are missing, are added to "
            f"load_col={config['load_col']}, those of items under item",
            keys=("model", "dataset", "load_col"),
        ) from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
    ) as error:
        (*_, place) = traceback.extract_tb(error.__traceback__)
        reason = str(error) or f"a condition of {Path(place.filename).name}, line {place.lineno}"
        raise UserError(
            f"model={config['model']} cannot be built of its settings: {reason}. "
            f"'list --explain --model={config['model']}' shows them",
            keys=("model",),
        ) from error


def check_features(config: Any, dataset: Any) -> None:
    """Refuse columns of items that would take no part in a model of RecBole.

    Its models ignore, without a message, number columns that ``numerical_features`` does not
    name; S3Rec ignores all number columns.

    Raises:
        UserError: naming the column and the key that would make it work.
    """
    for key in ("selected_features", "item_attribute"):
        if key not in config:
            continue
        names = config[key] if isinstance(config[key], list) else [config[key]]
        if not names:
            raise UserError(
                f"{key}={names} must name a column of the .item file",
                keys=(key,),
            )
        for name in names:
            reason, *others = _no_feature(config, dataset, name)
            if reason:
                raise UserError(
                    f"{key}={config[key]}: {name} would take no part: {reason}",
                    keys=(key, *others),
                )


def _no_feature(config: Any, dataset: Any, name: str) -> tuple[str, ...]:
    """Why a column cannot be a feature of items, '' if it can; and the keys that this names."""
    model = config["model"]
    if name not in dataset.field2type or dataset.item_feat is None:
        return f"it is not loaded. Add it to load_col={config['load_col']}, under item", "load_col"
    if name not in dataset.item_feat:
        return (
            "it is no column of the .item file, which alone has features of items; "
            f"load_col={config['load_col']}",
            "load_col",
        )
    kind = dataset.field2type[name].value
    if "float" not in kind:
        return ("",)
    if model == "S3Rec":
        return (f"it is {kind}, and attributes are token or token_seq",)
    if name not in config["numerical_features"]:
        return (
            f"it is {kind}, and numbers are features only if "
            f"numerical_features={config['numerical_features']} names them, too",
            "numerical_features",
        )
    if model == "SASRecF" and kind == "float_seq":
        return (f"RecBole's SASRecF cannot take {kind}; GRU4RecF and FDSA can",)
    return ("",)
