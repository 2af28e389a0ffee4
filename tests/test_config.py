"""Layers and their origin, safe parsing, and what is refused with which words."""

import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recbole
import torch
import yaml
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.trainer import Trainer

from recbole_simdiff import models as package
from recbole_simdiff.config import config as config_module
from recbole_simdiff.config import keys, lookup
from recbole_simdiff.config.config import CHECKPOINT, COMMAND_LINE, Config
from recbole_simdiff.config.layers import parse_overrides, parse_value, properties_dir, read_yaml
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import UserError
from recbole_simdiff.models import registry as models

MODEL = "SimDiffRec"


def refused(message: str, *files: Any, model: str = MODEL, **overrides: Any) -> None:
    with pytest.raises(UserError, match=message):
        Config(model, "toy", files, overrides, COMMAND_LINE)


# ---------------------------------------------------------------- layers


def test_every_layer_wins_over_the_one_before(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("tau: 0.3\nn_layers: 3\naug_items: denoiser\n")
    second.write_text("tau: 0.4\n")
    overrides = {"preset": "official", "n_heads": 4}
    config = Config(MODEL, "amazon-beauty", [first, second], overrides)
    ours, theirs = "properties", "recbole/properties"
    expected = {
        "learner": ("adam", f"{theirs}/overall.yaml"),
        "LIST_SUFFIX": ("_list", f"{theirs}/dataset/sample.yaml"),
        "epochs": (300, f"{ours}/overall.yaml"),  # of RecBole and of ours: ours is named
        "stopping_step": (10, f"{ours}/overall.yaml"),
        "hidden_size": (64, f"{ours}/model/{MODEL}.yaml"),
        "MAX_ITEM_LIST_LENGTH": (50, f"{ours}/dataset/amazon-beauty.yaml"),
        "cl_weight": (0.4, f"{ours}/tuned/amazon-beauty/{MODEL}.yaml"),
        "train_batch_size": (2048, f"{ours}/preset/{MODEL}/official.yaml"),
        "aug_count": ("fixed", f"{ours}/preset/{MODEL}/official.yaml"),
        "n_layers": (3, str(first)),
        "aug_items": ("denoiser", str(first)),  # the preset says random
        "tau": (0.4, str(second)),
        "n_heads": (4, "overrides"),
        "preset": ("official", "overrides"),
    }
    for key, (value, origin) in expected.items():
        assert (config[key], config.origin[key]) == (value, origin), key


def test_each_layer_changes_what_it_is_expected_to() -> None:
    """The values above would prove nothing if the layers agreed."""
    folder = properties_dir()
    overall, model = read_yaml(folder / "overall.yaml"), read_yaml(folder / f"model/{MODEL}.yaml")
    data = read_yaml(folder / "dataset/amazon-beauty.yaml")
    tuned = read_yaml(folder / f"tuned/amazon-beauty/{MODEL}.yaml")
    preset = read_yaml(folder / f"preset/{MODEL}/official.yaml")
    assert overall["train_batch_size"] != preset["train_batch_size"]
    assert overall["train_sampling"] != model["train_sampling"] != preset["train_sampling"]
    assert tuned["cl_weight"] != model["cl_weight"]
    assert "MAX_ITEM_LIST_LENGTH" in data
    assert Config(MODEL, "toy")["train_sampling"] == model["train_sampling"]
    assert Config("SASRec", "toy")["train_sampling"] == overall["train_sampling"]


def test_explain_lists_every_key_with_its_value_and_origin() -> None:
    rows = Config("GRU4Rec", "ml-100k", overrides={"loss_type": "BPR"}).explain()
    keys = [key for key, _, _ in rows]
    assert keys == sorted(keys)
    assert len(keys) > 80
    table = {key: (value, origin) for key, value, origin in rows}
    assert table["num_layers"] == (1, "recbole/properties/model/GRU4Rec.yaml")
    assert table["repeatable"] == (True, "properties/overall.yaml")
    assert table["loss_type"] == ("BPR", "overrides")
    assert table["train_neg_sample_args"][1] == "the loss of the model"
    assert all(origin for _, _, origin in rows)


def test_presets() -> None:
    for preset, key, value in (
        ("wo_k_noise", "noise_source", "gaussian"),
        ("wo_c_aug", "aug_position", "random"),
        ("wo_k_sample", "cl_negatives", "pos_only"),
        ("official", "aug_items", "random"),
        ("paper", "aug_items", "denoiser"),
    ):
        config = Config(MODEL, "toy", overrides={"preset": preset})
        assert config[key] == value
        if preset != "paper":
            assert config.origin[key] == f"properties/preset/{MODEL}/{preset}.yaml"
    refused("preset='papr' .command line. is not one of paper, official, wo_c_aug", preset="papr")
    refused("preset='official' .* is not one of paper$", preset="official", model="SASRec")


def test_a_preset_named_in_a_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: wo_k_noise\n")
    assert Config(MODEL, "toy", [file])["noise_source"] == "gaussian"
    assert Config(MODEL, "toy", [file], {"preset": "paper"})["noise_source"] == "similarity"


def test_the_callers_overrides_are_left_alone() -> None:
    overrides = {"learning_rate": 1, "eval_args": {"split": {"LS": "test_only"}, "order": "TO"}}
    before = json.dumps(overrides)
    Config("SASRec", "toy", overrides=overrides)
    assert json.dumps(overrides) == before


def test_restoring_from_plain_values_gives_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints store the plain values; a restored run must not differ in one of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for model, dataset, values in (
        (MODEL, "amazon-beauty", {"preset": "official", "tau": 1, "data_path": "/data"}),
        (MODEL, "ml-100k", {"metrics": "NDCG", "topk": 10, "clip_grad_norm": {"max_norm": 1.0}}),
        ("SASRec", "yelp", {"eval_args": {"split": {"LS": "valid_only"}, "order": "TO"}}),
        ("GRU4Rec", "toy", {"loss_type": "BPR"}),
        ("GRU4Rec", "toy", {"loss_type": "CE"}),
        ("S3Rec", "ml-100k", {}),
        ("FPMC", "toy", {"train_neg_sample_args": {"distribution": "popularity"}}),
    ):
        config = Config(model, dataset, overrides=values)
        plain = json.loads(json.dumps(config.plain()))
        assert (plain["model"], plain["dataset"]) == (model, dataset)
        again = Config(plain["model"], plain["dataset"], overrides=plain["values"])
        assert again.final_config_dict == config.final_config_dict
        assert again.plain() == config.plain()


def test_restoring_leaves_the_choice_of_gpus_to_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RecBole's default gpu_id is among the stored values; nobody asked for it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    plain = Config(MODEL, "toy").plain()
    Config(plain["model"], plain["dataset"], overrides=plain["values"], origin="checkpoint")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


# ---------------------------------------------------------------- keys


def test_unknown_keys_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    refused(
        r"unknown key 'cl_wieght' \(command line\) for model=SimDiffRec; did you mean cl_weight\?",
        cl_wieght=0.1,
    )
    refused("'list --explain --model=SimDiffRec' shows every key", zzzzzz=1)
    refused("unknown key 'k_noise' .* for model=SASRec", model="SASRec", k_noise=3)
    file = tmp_path / "mine.yaml"
    file.write_text("eppochs: 3\n")
    refused(rf"unknown key 'eppochs' \({file}\).*did you mean epochs", file)


@pytest.mark.parametrize(
    "key",
    [
        "save_dataset",
        "dataset_save_path",
        "save_dataloaders",
        "dataloaders_save_path",
        "enable_scaler",
    ],
)
def test_keys_that_would_pickle_or_scale_are_refused(key: str) -> None:
    value = "some.pth" if key.endswith("path") else True
    reason = "enable_amp uses bfloat16" if key == "enable_scaler" else "are rebuilt"
    refused(f"{key} .command line. is not supported: .*{reason}", **{key: value})
    off = None if key.endswith("path") else False
    assert not Config(MODEL, "toy", overrides={key: off})[key]


HOST = Path(recbole.__file__).parent


def read_in(source: str) -> set[str]:
    """Keys that a source reads from a configuration, be it as a subscript or by a helper."""
    found = set(re.findall(r"\[\s*f?[\"'](\w+)[\"']\s*\]", source))
    for call in re.findall(r"(?:require_\w+|\.get)\((.*?)\)\n", source, re.DOTALL):
        found |= set(re.findall(r"[\"'](\w+)[\"']", call))
    return found


SHIPPED = [properties_dir() / "overall.yaml"]
SHIPPED += sorted(properties_dir().glob("dataset/*.yaml"))
SHIPPED += sorted(properties_dir().glob("preset/*/*.yaml"))
SHIPPED += sorted(properties_dir().glob("tuned/*/*.yaml"))


def of_models() -> set[str]:
    """Keys of the files of models, RecBole's and this package's: each is that model's own."""
    files = [*properties_dir().glob("model/*.yaml"), *(HOST / "properties/model").glob("*.yaml")]
    return set().union(*map(read_yaml, files))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_key_has_a_row_or_is_a_models_own(file: Path) -> None:
    assert set(read_yaml(file)) <= keys.KEYS.keys() | of_models()


def test_what_every_model_shares_has_a_row() -> None:
    shared = read_yaml(properties_dir() / "overall.yaml").keys()
    for file in ("overall.yaml", "dataset/sample.yaml"):
        shared |= read_yaml(HOST / "properties" / file).keys()
    assert shared <= keys.KEYS.keys()
    # The other way round, every row is read: by all models or by one.
    named = {"augmentation_cache", "save_step", *keys.UNLISTED, "enable_amp"}
    assert keys.KEYS.keys() - shared <= named
    assert all(not (key.refused and key.unread) for key in keys.KEYS.values())


def test_lists_of_keys_follow_from_the_rows() -> None:
    """Of a run that goes on, what decides its numbers stays."""
    here = {"data_path", "use_gpu", "gpu_id", "show_progress"}
    assert here <= set(keys.RESUMABLE_KEYS) & set(keys.EVALUATION_KEYS) & keys.NOT_IN_RESULT
    ending = {"epochs", "stopping_step", "stopping_updates"}
    assert set(keys.RESUMABLE_KEYS) - keys.NOT_IN_RESULT == ending
    measures = {"metrics", "topk", "tail_ratio", "valid_metric", "length_groups"}
    assert set(keys.EVALUATION_KEYS) - keys.NOT_IN_RESULT == measures
    assert not keys.NOT_IN_RESULT & (keys.REFUSED.keys() | keys.UNREAD.keys())


def test_what_a_result_is_named_after() -> None:
    config = Config(MODEL, "toy", overrides={"tau": 0.2})
    named = config.identity()
    assert (named["model"], named["dataset"], named["values"]["tau"]) == (MODEL, "toy", 0.2)
    assert named["values"].keys() == config.plain()["values"].keys() - keys.NOT_IN_RESULT
    elsewhere = Config(MODEL, "toy", overrides={"tau": 0.2, "data_path": "/data", "worker": 2})
    assert elsewhere.identity() == named != Config(MODEL, "toy").identity()
    assert elsewhere.data_root == "/data"


def test_the_table_of_what_recboles_models_read_is_that_of_their_sources() -> None:
    """In RecBole's package no list says it."""
    labels, preloaded, beside = set(), set(), {}
    for name, model in models.recbole_models().items():
        source = inspect.getsource(model)
        labels |= {name} if "LABEL_FIELD" in source else set()
        preloaded |= {name} if "get_preload_weight" in source else set()
        if models.needed_data_set(name):
            continue
        config = Config(name, "toy")
        listed = {key for listed in config.parameters.values() for key in listed}
        listed |= {*config.internal_config_dict, *keys.DERIVED, *keys.WRITTEN}
        if unlisted := set(re.findall(r"config\[\"(\w+)\"\]", source)) - listed:
            beside[name] = unlisted
    assert (labels, preloaded) == (keys.LABELS, keys.PRELOADED)
    assert beside == keys.UNLISTED_OF_MODEL


def common_readers() -> set[str]:
    """Keys that are read whatever the model is: by RecBole's data, by its trainer, and here."""
    files = ["data/dataset/dataset.py", "data/dataset/sequential_dataset.py", "data/utils.py"]
    files += ["data/dataloader/abstract_dataloader.py", "data/dataloader/general_dataloader.py"]
    files += ["evaluator/base_metric.py", "evaluator/collector.py", "evaluator/evaluator.py"]
    files += ["evaluator/metrics.py", "evaluator/register.py", "data/transform.py"]
    sources = [(HOST / file).read_text() for file in files]
    sources += [inspect.getsource(SequentialRecommender), inspect.getsource(Trainer.__init__)]
    package = Path(config_module.__file__).parents[1]
    rooms = ("cli", "data", "evaluation", "pipelines", "runs", "serving", "training")
    ours = [path for room in rooms for path in package.glob(f"{room}/*.py")]
    sources += [path.read_text() for path in ours if path.stem != "prepare"]
    keys = set().union(*map(read_in, sources))
    return keys | {"alias_of_user_id", "alias_of_item_id", "log_wandb", "log_mlflow"}  # f-strings


def test_every_key_that_is_accepted_is_read_or_refused() -> None:
    """By the model, what it derives from, or what every model shares."""
    common = common_readers() | {"preset", "gpu_id", "repeatable"}  # by Config itself
    common.add("loss_memory_mb")  # a benchmark sets it for all its rows, RecBole's models included
    assert len(common) > 60
    refusals = "unknown key|has no effect|is not supported"
    for model in models.available_models():
        if models.needed_data_set(model):
            continue
        config = Config(model, "yelp")  # whose file has keys of Transformers
        modules = {m.__module__ for m in config.model_class.__mro__}
        modules = {m for m in modules if m.startswith(("recbole.model.seq", "recbole_simdiff"))}
        own = set().union(*(read_in(Path(sys.modules[m].__file__).read_text()) for m in modules))
        keys = {key for keys in config.parameters.values() for key in keys}
        keys |= {*config.internal_config_dict, "device", "single_spec", "config_files"}
        for key in sorted(keys - common - own):
            with pytest.raises(UserError, match=refusals):
                Config(model, "yelp", overrides={key: "something else"})


@pytest.mark.parametrize(
    "key", ["POSITION_FIELD", "RATING_FIELD", "loss_decimal_place", "kg_reverse_r", "require_pow"]
)
def test_keys_that_nothing_reads_may_keep_their_defaults_only(key: str) -> None:
    default = Config(MODEL, "toy")[key]
    assert Config(MODEL, "toy", overrides={key: default})[key] == default
    other = 7 if key == "loss_decimal_place" else True if isinstance(default, bool) else "x"
    refused(rf"{key}={other!r} \(command line\) has no effect: ", **{key: other})
    stored = Config(MODEL, "toy", overrides={key: other}, origin=CHECKPOINT)  # as it was made
    assert stored[key] == other


@pytest.mark.parametrize("key", ["config_file", "config_files", "config_file_list"])
def test_what_names_yaml_files_elsewhere_is_refused_with_the_right_name(key: str) -> None:
    refused(f"unknown key '{key}' .*; YAML files are given by config_files", **{key: "gone.yaml"})


def test_keys_of_a_data_sets_file_that_the_model_does_not_read_are_refused() -> None:
    """yelp.yaml has them for Transformers."""
    plain = Config("GRU4Rec", "yelp").plain()
    assert plain["values"]["attn_dropout_prob"] == 0.1
    again = Config(plain["model"], plain["dataset"], overrides=plain["values"])
    assert again.plain() == plain
    with pytest.raises(UserError, match=r"unknown key 'attn_dropout_prob' .* for model=GRU4Rec"):
        Config("GRU4Rec", "yelp", overrides={"attn_dropout_prob": 0.3})
    assert (
        Config("SASRec", "yelp", overrides={"attn_dropout_prob": 0.3})["attn_dropout_prob"] == 0.3
    )


def test_keys_that_transforms_write_are_not_taken() -> None:
    refused("unknown key 'MASK_INDEX'", model="BERT4Rec", MASK_INDEX="x")
    Config("BERT4Rec", "toy", overrides={"MASK_INDEX": "MASK_INDEX"}, origin=CHECKPOINT)


def test_unknown_models_are_refused() -> None:
    refused(
        "model='SimDifRec' is not a sequential model.*Did you mean SimDiffRec", model="SimDifRec"
    )


# ---------------------------------------------------------------- types and values


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("aug_dropout", 1, "true or false"),
        ("aug_dropout", "yes please", "true or false"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "ten", "a whole number"),
        ("epochs", None, "a whole number"),
        ("tau", "warm", "a number"),
        ("tau", False, "a number"),
        ("tau", [0.1], "a number"),
        ("sr_loss", ["CE"], "text"),
        ("sr_loss", True, "text"),
        ("sr_loss", 1.5, "text"),
        ("metrics", {"NDCG": 10}, "a list"),
        ("topk", 2.5, "a list"),
        ("topk", None, "a list"),
        ("eval_args", "full", "a mapping or None"),
        ("eval_args", ["full"], "a mapping or None"),
    ],
)
def test_wrong_types_are_refused(key: str, value: Any, wanted: str) -> None:
    refused(rf"{key}=.* \(command line\) must be {wanted}; the default is ", **{key: value})


def test_the_message_about_a_wrong_type_names_both_sources(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("hidden_size: wide\n")
    message = (
        rf"hidden_size='wide' \({file}\) must be a whole number; the default is 64 "
        rf"\(properties/model/{MODEL}.yaml\)"
    )
    refused(message, file)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("SASRec", {"loss_type": "ce"}, "loss_type='ce' .* is not one of BPR, CE"),
        ("SASRec", {"n_layers": -1}, "n_layers=-1 must be at least 1, at most 1,000 "),
        ("SASRec", {"n_layers": 10**9}, "n_layers=1000000000 must be at least 1, at most 1,000 "),
        ("SASRec", {"hidden_size": -1}, "hidden_size=-1 must be at least 1"),
        ("SASRec", {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ("SASRec", {"hidden_size": 10**12}, "hidden_size=1000000000000 must be .* at most"),
        ("SASRec", {"initializer_range": -1}, "initializer_range=-1.0 must be at least 0"),
        ("SASRec", {"initializer_range": math.nan}, "initializer_range=nan must be at least 0"),
        ("SASRec", {"layer_norm_eps": math.inf}, "layer_norm_eps=inf must be finite"),
        ("SASRec", {"train_batch_size": 1e30}, "train_batch_size=1.* must be at least 1, at most"),
        (
            "SASRec",
            {"eval_batch_size": 10**20},
            "eval_batch_size=1.* must be a number of at most 2",
        ),
        ("SASRec", {"epochs": 10**400}, "epochs=1000.* must be a number of at most 2"),
        ("SASRec", {"MAX_ITEM_LIST_LENGTH": 10**12}, "must be at least 1, at most 1,000,000"),
        (MODEL, {"diffusion_steps": 10**11}, "diffusion_steps=1.* at most 1,000,000"),
        ("GRU4Rec", {"dropout_prob": 1.5}, r"dropout_prob=1.5 must lie in \[0, 1\]"),
        ("GRU4Rec", {"num_layers": 0}, "num_layers=0 must be at least 1"),
        ("NARM", {"dropout_probs": [0.1]}, "dropout_probs=.* must be a list of two numbers"),
        ("NextItNet", {"dilations": [0]}, "must be a list of whole numbers of at least 1"),
        ("HRM", {"pooling_type_layer_1": "mean"}, "is not one of average, max"),
        ("SINE", {"tau_ratio": 0}, "tau_ratio=0.0 must be positive"),
        ("DIN", {"pooling_mode": "all"}, "pooling_mode='all' .* is not one of mean, max, sum"),
        ("HGN", {"reg_weight": [0.1, -1]}, "reg_weight=.* must be at least 0, or a list"),
        ("HGN", {"reg_weight": [0.1]}, "reg_weight=.* must be at least 0, or a list of two"),
        ("SHAN", {"reg_weight": 1}, "reg_weight=1 .* must be a list; the default is"),
        ("GRU4RecCPR", {"use_proj_bias": 2}, "use_proj_bias=2 must be at least 0, at most 1 "),
        ("SASRec", {"encoding": ["a"]}, r"encoding=\['a'\] must be text"),
        ("SASRec", {"LIST_SUFFIX": None}, "LIST_SUFFIX=None must be text, and not empty"),
        ("SASRec", {"LIST_SUFFIX": ""}, "LIST_SUFFIX='' must be text, and not empty"),
        ("SASRec", {"USER_ID_FIELD": None}, "USER_ID_FIELD=None must be text"),
        ("SASRec", {"alias_of_user_id": "x"}, r"alias_of_user_id='x' must be a list of names"),
        ("SASRec", {"discretization": "foo"}, "discretization='foo' must be like {column: {met"),
        ("SASRec", {"discretization": {"a": {"method": "ED"}}}, "must be like {column: {method"),
        ("SASRec", {"normalize_all": "maybe"}, "normalize_all='maybe' must be true or false"),
        ("SASRec", {"normalize_field": [1]}, r"normalize_field=\[1\] must be a list of names"),
        ("SASRec", {"valid_metric": 5}, "valid_metric=5 must be text"),
        ("SASRec", {"seq_len": {"a": 0}}, "seq_len=.* must be like {column: 10}"),
        ("SASRec", {"unused_col": ["a"]}, "unused_col=.* must be like {inter: "),
        ("SASRec", {"unused_col": {"inter": ["user_id"]}}, "must not include item_id, user_id, wh"),
        ("SASRec", {"data_path": None}, "data_path=None must be text"),
        ("FDSA", {"selected_features": "class"}, "selected_features='class' .* must be a list"),
        ("DIN", {"threshold": {"rating": "3"}}, "threshold=.* must be like {rating: 3}"),
        ("DIN", {"threshold": {"rating": 3, "x": 1}}, "threshold=.* must be like {rating: 3}"),
        ("SASRec", {"threshold": {"rating": 3}}, r"SASRec reads no labels; val_interval={'rating'"),
        ("SASRec", {"preload_weight": {"a": "b"}}, "has no effect: SASRec reads no preloaded"),
        ("SASRec", {"transform": "crop_itemseq"}, "transform='crop_itemseq' must be None or inver"),
        ("SASRec", {"transform": "mask_itemseq"}, "which does not read the result of any"),
        ("BERT4Rec", {"transform": None}, "transform=None must be mask_itemseq for BERT4Rec"),
        ("BERT4Rec", {"mask_ratio": 0}, "mask_ratio=0.0 of MAX_ITEM_LIST_LENGTH=50 items masks no"),
        ("SASRec", {"user_inter_num_interval": "[a,b]"}, "must be an interval such as"),
        ("SASRec", {"user_inter_num_interval": "[5,2]"}, "must be an interval such as"),
        ("SASRec", {"user_inter_num_interval": "[1,2];x"}, "must be an interval such as"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranges_and_forms_hold_for_every_model(
    model: str, values: dict[str, Any], message: str
) -> None:
    refused(message, model=model, **values)


def test_every_model_is_within_its_ranges() -> None:
    """Defaults of RecBole and of this package, and the ends of their ranges."""
    for model in models.available_models():
        for dataset in ("toy", "ml-100k", "yelp"):
            Config(model, dataset)
    ends = {"initializer_range": 0, "hidden_dropout_prob": 1, "seed": 2**32 - 1}
    for key, value in ends.items():
        assert Config("SASRec", "toy", overrides={key: value})[key] == value
    assert Config("HRM", "toy", overrides={"reg_weight": 0.1})["reg_weight"] == 0.1
    labels = Config("DIN", "toy", overrides={"threshold": {"rating": 3}})
    assert labels["threshold"] == {"rating": 3}
    old = Config("SASRec", "toy", overrides={"threshold": {"rating": 3}}, origin=CHECKPOINT)
    assert old["threshold"] == {"rating": 3}


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", "..", ".hidden", "", None, 3])
def test_names_become_names_of_files(name: Any) -> None:
    with pytest.raises(UserError, match=f"^dataset={re.escape(repr(name))} must be a name"):
        Config(MODEL, name)
    with pytest.raises(UserError, match=f"^model={re.escape(repr(name))} must be a name"):
        Config(name, "toy")


def test_values_of_python_code() -> None:
    """NumPy's numbers are numbers, tuples lists and paths text; a message names overrides."""
    values = {
        "learning_rate": np.float32(0.5),
        "epochs": np.int64(5),
        "enable_amp": np.bool_(True),
        "topk": (np.int64(5), 10),
        "length_groups": np.array([5, 20]),
        "eval_args": {"split": {"RS": (np.float64(0.8), 0.1, 0.1)}},
        "data_path": Path("/data"),
    }
    config = Config("SASRec", "toy", overrides=values)
    assert json.loads(json.dumps(config.plain()))["values"] == config.plain()["values"]
    assert (config["learning_rate"], config["epochs"], config["enable_amp"]) == (0.5, 5, True)
    assert (config["topk"], config["length_groups"]) == ([5, 10], [5, 20])
    assert (config["eval_args"]["split"], config["data_path"]) == (
        {"RS": [0.8, 0.1, 0.1]},
        "/data/toy",
    )
    assert isinstance(values["epochs"], np.int64)  # the caller's own stays as it is
    with pytest.raises(UserError, match=r"epochs='many' \(overrides\) must be a whole number"):
        Config("SASRec", "toy", overrides={"epochs": "many"})


def test_numbers_take_the_type_of_their_default() -> None:
    config = Config(MODEL, "toy", overrides={"learning_rate": 1, "epochs": 3.0})
    assert isinstance(config["learning_rate"], float)
    assert isinstance(config["epochs"], int)
    assert (config["learning_rate"], config["epochs"]) == (1.0, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, r"epochs=0 must be at least 1, .* \(epochs from command line\)"),
        ({"train_batch_size": -1}, "train_batch_size=-1 must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"eval_step": 0}, "eval_step=0 must be at least 1"),
        ({"stopping_step": 0}, "stopping_step=0 must be at least 1"),
        ({"MAX_ITEM_LIST_LENGTH": 0}, "MAX_ITEM_LIST_LENGTH=0 must be at least 1"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"train_sampling": "all"}, "is not one of user_all, prefix_last, p"),
        ({"rm_dup_inter": False}, "rm_dup_inter=False .* is not one of None, first, last$"),
        ({"rm_dup_inter": 0}, "rm_dup_inter=0 .* is not one of None, first, last$"),
        ({"metric_decimal_place": -1}, "decimal_place=-1 must be at least 0, at most 15"),
        ({"load_col": {"inter": None}}, r"load_col=\{'inter': None\} must be like \{inter: \["),
        ({"load_col": {"inter": "item_id"}}, r"load_col=\{'inter': 'item_id'\} must be like"),
        ({"unload_col": {"inter": [1]}}, r"unload_col=\{'inter': \[1\]\} must be like"),
        ({"learner": "sparse_adam"}, "is not one of adam, adamw, sgd, adagrad, rmsprop$"),
        (
            {"metrics": ["Luck"]},
            r"'Luck' is not one of averagep.*ndcg.* \(metrics from command line\)",
        ),
        ({"metrics": ["Hit", "AUC"]}, "'AUC' is not one of averagepopularity, gauc"),
        ({"eval_args": {"mode": "labeled"}}, "mode='labeled' must be full, or uni or pop"),
        ({"topk": 5}, r"valid_metric=NDCG@10 .* at one of topk=\[5\], e\.g\. Hit@5 \(topk from c"),
        ({"topk": [0]}, r"topk=\[0\] must be whole numbers of at least 1"),
        ({"repeatable": False}, "repeatable"),
        ({"sr_loss": "MSE"}, "sr_loss='MSE' is not one of CE, BCE"),
        ({"noise_source": "none"}, "noise_source='none' is not one of similarity, gaussian"),
        ({"k_noise": 0}, "k_noise=0 must be at least 1"),
        ({"k_sample": 0}, "k_sample=0 must be at least 1"),
        ({"reverse_steps": 0}, "reverse_steps=0 must be at least 1"),
        ({"cl_weight": -0.1}, "cl_weight=-0.1 must be at least 0"),
        ({"diff_weight": -1}, "diff_weight=-1.0 must be at least 0"),
        ({"aug_ratio": 0}, r"aug_ratio=0.0 must lie in \(0, 1\]"),
        ({"aug_ratio": 1.1}, r"aug_ratio=1.1 must lie in \(0, 1\]"),
        ({"tau": 0}, "tau=0.0 must be positive"),
        ({"beta_start": 0.5}, "beta_start=0.5 and beta_end=0.02 must satisfy"),
        ({"reverse_steps": 1001}, "reverse_steps=1001 must not exceed diffusion_steps=1000"),
        ({"n_heads": 3}, "hidden_size=64 must be a multiple of n_heads=3"),
        ({"denoiser_heads": 3}, "hidden_size=64 must be a multiple of denoiser_heads=3"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"hidden_dropout_prob": 1}, r"hidden_dropout_prob=1.0 must lie in \[0, 1\)"),
        ({"attn_dropout_prob": -0.1}, r"attn_dropout_prob=-0.1 must lie in \[0, 1"),
        ({"loss_memory_mb": 0}, "loss_memory_mb=0.0 must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    refused(message, **values)


@pytest.mark.parametrize(
    ("values", "origins"),
    [
        ({"tau": -1}, "tau from FILE"),
        ({"aug_ratio": 0}, "aug_ratio from FILE"),
        ({"seed": -1}, "seed from FILE"),
        ({"learning_rate": 0}, "learning_rate from FILE"),
        ({"topk": []}, "topk from FILE"),
        ({"eval_args": {"order": "RO"}}, "eval_args from FILE"),
        (
            {"n_heads": 3},
            f"hidden_size from properties/model/{MODEL}.yaml, n_heads from FILE",
        ),
        (
            {"valid_metric": "NDCG@7"},
            "metrics from properties/overall.yaml, topk from properties/overall.yaml",
        ),
    ],
)
def test_an_impossible_value_names_its_origin(
    tmp_path: Path, values: dict[str, Any], origins: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        Config(MODEL, "toy", [file])
    message = str(caught.value)
    assert message.endswith(f" ({origins.replace('FILE', str(file))})")
    assert message.count(str(file)) == 1  # also where the check itself has named it


def test_a_message_about_no_value_is_left_alone() -> None:
    config = Config(MODEL, "toy", overrides={"tau": 0.2})
    with (
        pytest.raises(UserError, match=r"^the items of tau=0\.2 are gone$"),
        config.naming_origins(),
    ):
        raise UserError("the items of tau=0.2 are gone")


def test_a_message_says_once_where_the_values_of_its_keys_come_from() -> None:
    config = Config(MODEL, "toy", overrides={"tau": 0.2})
    message = r"^too warm \(tau from overrides, k_noise from properties/model/SimDiffRec\.yaml\)$"
    with pytest.raises(UserError, match=message), config.naming_origins(), config.naming_origins():
        raise UserError("too warm", keys=("tau", "k_noise", "tau", "zzz"))


@pytest.mark.parametrize("metric", ["NDCG@7", "Precision@10", "NDCG", "@10", "10"])
def test_the_selecting_metric_must_be_computed(metric: str) -> None:
    refused(
        rf"valid_metric={metric} \(command line\) must be one of metrics=\['Hit', 'NDCG', 'MRR'\] "
        r"at one of topk=\[5, 10, 20\]",
        valid_metric=metric,
    )


def test_the_selecting_metric_follows_metrics_and_topk() -> None:
    values = {"metrics": "Recall", "topk": 7, "valid_metric": "recall@7"}
    config = Config(MODEL, "toy", overrides=values)
    assert (config["metrics"], config["topk"]) == (["Recall"], [7])
    refused("valid_metric=NDCG@10 .properties/overall.yaml. must be one of", topk=[5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modee": "uni100"}, r"unknown key 'modee'; did you mean mode\? Allowed are split, gr"),
        ({"x": 1}, "unknown key 'x'; allowed are split, group_by, order, mode"),
        ({"mode": {"tst": "uni100"}}, r"mode: unknown key 'tst'; did you mean test\?"),
        ({"mode": "uni"}, "mode='uni' must be full, or uni or pop"),
        ({"mode": {"valid": "full", "test": "some"}}, "mode=.*'some'} must be full, or uni"),
        ({"split": "LS"}, "split='LS' must be {LS: one of valid_and_test, valid_only, test_only}"),
        ({"split": {"LS": "both"}}, "split={'LS': 'both'} must be {LS: one of"),
        ({"split": {"RS": [8, 1]}}, r"split={'RS': \[8, 1\]} must be .* such as {RS: \[0.8"),
        ({"split": {"RS": [8, 1, "1"]}}, "split=.* or ratios of training, validation and test"),
        ({"split": {"RS": [0, 1, 1]}}, "split=.* or ratios of training, validation and test"),
        ({"split": {"TS": [8, 1, -1]}}, "split=.* or ratios of training, validation and test"),
        ({"split": {"LS": "test_only", "RS": [8, 1, 1]}}, "split=.* must be {LS: one of"),
        ({"split": {}}, "split={} must be {LS: one of"),
        ({"group_by": "item"}, "group_by='item' must be user or none"),
    ],
)
def test_parts_of_eval_args_are_checked(values: dict[str, Any], message: str) -> None:
    """RecBole ignores unknown ones and then ranks or splits as by default."""
    refused(f"^eval_args: {message}", eval_args=values)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "pop20", "group_by": None},
        {"mode": {"test": "uni5"}, "group_by": "None"},
        {"split": {"RS": [8, 1, 1]}, "group_by": "none"},
        {"split": {"TS": [0.9, 0, 0.1]}},
        {"split": {"LS": "test_only"}},
    ],
)
def test_what_recbole_knows_of_eval_args_is_taken(values: dict[str, Any]) -> None:
    found = Config(MODEL, "toy", overrides={"eval_args": values})["eval_args"]
    if "split" in values:
        assert found["split"] == values["split"]


@pytest.mark.parametrize("tail", [0, -0.5, 1.5, 2.5, "a", True, [0.5]])
def test_a_tail_is_a_share_or_a_count(tail: Any) -> None:
    refused(r"^tail_ratio=.* must be a ratio in \(0, 1\]", tail_ratio=tail)
    for good in (0.5, 1, 2, 3.0, None):
        assert Config(MODEL, "toy", overrides={"tail_ratio": good})["tail_ratio"] == good


@pytest.mark.parametrize(
    ("held_out", "args"),
    [
        (("valid", "test"), {}),
        (("valid", "test"), {"split": {"LS": "valid_and_test"}}),
        (("valid",), {"split": {"LS": "valid_only"}}),
        (("test",), {"split": {"LS": "test_only"}}),
        (("valid", "test"), {"split": {"RS": [8, 1, 1]}}),
        (("test",), {"split": {"TS": [0.9, 0, 0.1]}}),
        (("valid",), {"split": {"RS": [0.9, 0.1, 0]}}),
        ((), {"split": {"RS": [1, 0, 0]}}),
    ],
)
def test_parts_that_a_split_holds_out(held_out: tuple[str, ...], args: dict[str, Any]) -> None:
    assert Config(MODEL, "toy", overrides={"eval_args": args}).held_out == held_out
    files = {"benchmark_filename": ["train", "valid", "test"]}
    assert Config(MODEL, "toy", overrides={"eval_args": args} | files).held_out == (
        "valid",
        "test",
    )


@pytest.mark.parametrize(
    "args",
    [{"mode": "uni100"}, {"mode": {"valid": "full", "test": "pop5"}}, {"split": {"RS": [1, 0, 0]}}],
)
def test_rankings_that_would_not_be_saved_are_refused(args: dict[str, Any]) -> None:
    """A run of an earlier version that asked for them can still be read."""
    values = {"save_rankings": True, "eval_args": args}
    refused("^save_rankings=True writes the test ranks among all items", **values)
    assert Config(MODEL, "toy", (), values, "checkpoint")["save_rankings"]
    valid = {"mode": {"valid": "uni100", "test": "full"}}
    assert Config(MODEL, "toy", (), values | {"eval_args": valid})["save_rankings"]


@pytest.mark.parametrize(
    "values",
    [
        {"train_stage": "finetune"},
        {"train_stage": "pretrain"},
        {"pre_model_path": "x.pth"},
        {"train_stage": "finetune", "pre_model_path": "saved/run/best.safetensors"},
    ],
)
def test_stages_that_a_pickled_file_would_join_are_refused(values: dict[str, str]) -> None:
    """Typed or, with another value than RecBole's default, loaded; in DiffuASR's backbone, too."""
    message = (
        r"is not supported: both stages of S3Rec are trained in one run, .*\.pth\) are never opened"
    )
    key = next(iter(values))
    refused(rf"^{key}=.*\(command line\) {message}", model="S3Rec", **values)
    refused(message, model="DiffuASR", backbone="S3Rec", **values)
    plain = Config("S3Rec", "toy").plain()["values"]
    stored = Config("S3Rec", "toy", (), plain, "checkpoint")
    assert (stored["train_stage"], stored["pre_model_path"]) == ("pretrain", "")
    if values != {"train_stage": "pretrain"}:
        with pytest.raises(UserError, match=rf"\(checkpoint\) {message}"):
            Config("S3Rec", "toy", (), plain | values, "checkpoint")


def test_epochs_of_a_first_stage_are_not_negative() -> None:
    refused("^pretrain_epochs=-1 must be at least 0", model="S3Rec", pretrain_epochs=-1)


def test_users_items_and_times_are_loaded_unless_something_else_is_asked_for() -> None:
    config = Config(MODEL, "toy", overrides={"TIME_FIELD": "date", "ITEM_ID_FIELD": "shop"})
    assert config["load_col"] == {"inter": ["user_id", "shop", "date"]}
    assert config.origin["load_col"] == "the fields of user, item and time"
    ready = Config(MODEL, "toy", overrides={"benchmark_filename": ["train", "valid", "test"]})
    assert ready["load_col"] == {"inter": ["user_id", "item_id", "item_id_list"]}
    for given in (None, {"inter": ["user_id", "item_id"]}):
        assert Config(MODEL, "toy", overrides={"load_col": given})["load_col"] == given
    yelp = Config(MODEL, "yelp")
    assert yelp["load_col"] == {"inter": ["user_id", "business_id", "date"]}
    assert yelp.origin["load_col"] == "properties/dataset/yelp.yaml"


def test_recboles_models_transform_their_batches() -> None:
    config = Config("SASRec", "toy", overrides={"transform": "inverse_itemseq"})
    assert config["transform"] == "inverse_itemseq"


def test_recboles_models_train_on_prefixes() -> None:
    assert Config("SASRec", "toy")["train_sampling"] == "prefix_last"
    for style in ("user_all", "prefix_all"):
        message = f"train_sampling={style} is not available for SASRec"
        refused(message, model="SASRec", train_sampling=style)
        assert Config(MODEL, "toy", overrides={"train_sampling": style})["train_sampling"] == style


def test_an_order_that_sequential_data_cannot_have_is_a_users_error(make_config: Any) -> None:
    def prepare() -> None:
        config = make_config(eval_args={"split": {"LS": "valid_and_test"}, "order": "RO"})
        create_loaders(config, create_dataset(config))

    with pytest.raises(UserError, match="TO"):
        prepare()


def test_negative_samples_follow_the_loss() -> None:
    def negatives(model: str, **overrides: Any) -> tuple[str, Any]:
        found = Config(model, "toy", overrides=overrides)["train_neg_sample_args"]
        return found["distribution"], found["sample_num"]

    assert negatives("GRU4Rec") == ("none", "none")
    assert negatives("GRU4Rec", loss_type="BPR") == ("uniform", 1)
    assert negatives("FPMC") == ("uniform", 1)  # pairwise by its class
    assert negatives(MODEL) == ("none", "none")
    popular = {"distribution": "popularity", "sample_num": 2}
    assert negatives("GRU4Rec", loss_type="BPR", train_neg_sample_args=popular) == ("popularity", 2)
    refused("train_neg_sample_args.*None", model="GRU4Rec", train_neg_sample_args=popular)


# ---------------------------------------------------------------- device


def test_use_gpu_decides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Config(MODEL, "toy")["device"].type == "cuda"
    assert Config(MODEL, "toy", overrides={"use_gpu": False})["device"].type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Config(MODEL, "toy")["device"].type == "cpu"


def test_visible_gpus_change_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    Config(MODEL, "toy", overrides={"use_gpu": False})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    Config(MODEL, "toy")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # so that it is restored after the next line
    Config(MODEL, "toy", overrides={"gpu_id": 2})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+2", -250.0),
        (".5e-1", 0.05),
        ("3", 3),
        ("-3", -3),
        ("0.1", 0.1),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("~", None),
        ("[5,10]", [5, 10]),
        ("[Hit, NDCG]", ["Hit", "NDCG"]),
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("{'RS': [0.8, 0.1, 0.1]}", {"RS": [0.8, 0.1, 0.1]}),
        ("NDCG@10", "NDCG@10"),
        ("2020-10-10", "2020-10-10"),
        ("2020-10-10 12:00:00", "2020-10-10 12:00:00"),
        ("'1e-3'", "1e-3"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("[5,10", "[5,10"),
        ("@home", "@home"),
        ("a: b: c", "a: b: c"),
        ("[5,inf)", "[5,inf)"),
        ("a=b=c", "a=b=c"),
    ],
)
def test_values_mean_what_they_look_like(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {marker}')",
        "open('{marker}', 'w')",
        "1/0",
        "os.getcwd()",
        '!!python/object/apply:os.system ["touch {marker}"]',
        "!!python/name:os.system",
        "print(1)",
    ],
)
def test_nothing_typed_is_evaluated(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    text = text.format(marker=marker)
    assert parse_value(text) == text
    overrides = parse_overrides([f"--wandb_project={text}", f"--data_path={text}"])
    for values in (overrides, {"wandb_project": text, "data_path": text}):
        config = Config(MODEL, "toy", overrides=values)
        assert config["wandb_project"] == text
        assert config["data_path"] == os.path.join(text, "toy")
    assert not marker.exists()


def test_files_with_python_tags_are_refused_unevaluated(tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.yaml", tmp_path / "marker"
    file.write_text(f'state: !!python/object/apply:os.system ["touch {marker}"]\n')
    refused("evil.yaml is not a YAML file", file)
    assert not marker.exists()
    file.write_text(f"wandb_project: \"open('{marker}', 'w')\"\n")
    assert Config(MODEL, "toy", [file])["wandb_project"].startswith("open(")
    assert not marker.exists()


BOMB = (
    "[&a ["
    + "1, " * 9
    + "1]"
    + "".join(
        f", &{name} [{', '.join([f'*{before}'] * 10)}]"
        for before, name in itertools.pairwise("abcdefghi")
    )
    + "]"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "with its aliases expanded it has more than 100,000 values"),
        ("&a [*a]", "with its aliases expanded it has more than 100,000 values"),
        ("[" * 30_000 + "]" * 30_000, "more than 50 lists are nested in each other"),
        ("{a: " * 30_000 + "1" + "}" * 30_000, "more than 50 lists are nested in each other"),
    ],
    ids=["aliases", "itself", "lists", "mappings"],
)
def test_endless_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Within a second, and in a line that can be read."""
    file = tmp_path / "run.yaml"
    file.write_text(f"metrics: {text}\n")
    for read in (lambda: parse_overrides([f"--topk={text}"]), lambda: read_yaml(file)):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 2_100
    with pytest.raises(UserError, match=r"^--topk: "):
        parse_overrides([f"--topk={text}"])


def test_aliases_stay_allowed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("topk: &k [5, 10]\nlength_groups: *k\neval_args: {split: {LS: test_only}}\n")
    assert read_yaml(file)["length_groups"] == [5, 10]
    assert parse_value("[&a [1], *a, *a]") == [[1], [1], [1]]
    assert parse_value("[" * 50 + "]" * 50) != "[" * 50 + "]" * 50


@pytest.mark.parametrize("digits", ["9" * 10_000, "0x" + "f" * 10_000], ids=["decimal", "hex"])
def test_numbers_of_thousands_of_digits(digits: str) -> None:
    """Python prints none of more than 4,300."""
    with pytest.raises(UserError, match=r"^epochs=.* must be") as caught:
        Config(MODEL, "toy", overrides=parse_overrides([f"--epochs={digits}"]))
    assert len(str(caught.value)) < 2_100


def test_long_names_and_values_are_shortened() -> None:
    with pytest.raises(UserError, match=r"^unknown key 'kkk.* \.\.\. .*shows every key$") as caught:
        Config(MODEL, "toy", overrides={"k" * 100_000: 1})
    assert len(str(caught.value)) < 2_100
    refused("^metrics=.*nnn' is not one of", metrics=["n" * 100_000])


def test_both_forms_of_an_override() -> None:
    arguments = ["--tau=0.2", "--topk", "[5,10]", "--preset=None", "--k_noise", "-1", "--a=b=c"]
    assert parse_overrides(arguments) == {
        "tau": 0.2,
        "topk": [5, 10],
        "preset": None,
        "k_noise": -1,
        "a": "b=c",
    }
    assert parse_overrides([]) == {}


@pytest.mark.parametrize("arguments", [["--preset="], ["--preset", ""]])
def test_an_empty_value_is_refused(arguments: list[str]) -> None:
    """As of a shell variable that is not set; None is what stands for nothing."""
    with pytest.raises(UserError, match="--preset= is empty; give a value, or preset=None"):
        parse_overrides(arguments)


@pytest.mark.parametrize("key", ["field_separator", "seq_separator"])
def test_a_separator_that_is_none_is_refused(key: str, tmp_path: Path) -> None:
    """As typed, it is text; a file may hold anything."""
    for value in (None, "", 5, "\n", "a\rb"):
        refused(f"{key}=.* must be text without a line break.*from command line", **{key: value})
    assert parse_overrides([f"--{key}=5"]) == {key: "5"}
    for typed in ("None", "''", '""'):
        refused(f"{key}=.* must be text", **parse_overrides([f"--{key}={typed}"]))
    (tmp_path / "run.yaml").write_text(f"{key}: '\\t'\n")
    assert Config(MODEL, "toy", [tmp_path / "run.yaml"])[key] == "\t"


def test_a_key_given_twice_must_agree() -> None:
    assert parse_overrides(["--tau=0.2", "--tau", "0.20"]) == {"tau": 0.2}
    with pytest.raises(UserError, match=r"--tau is given twice: 0\.2 and 0\.3"):
        parse_overrides(["--tau=0.2", "--tau=0.3"])


@pytest.mark.parametrize("arguments", [["tau=0.2"], ["-tau=0.2"], ["--=3"], ["--"], ["stray"]])
def test_other_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="is not of the form --key=value"):
        parse_overrides(arguments)


@pytest.mark.parametrize("arguments", [["--tau"], ["--tau", "--k_noise=3"]])
def test_a_key_without_a_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="--tau needs a value: --tau=value"):
        parse_overrides(arguments)


def test_the_command_line_of_the_process_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole reads it even under pytest or a notebook."""
    monkeypatch.setattr(sys, "argv", ["pytest", "--epochs=7", "--bogus=1", "--seed=99"])
    config = Config(MODEL, "toy")
    assert (config["epochs"], config["seed"]) == (300, 2020)
    assert "bogus" not in config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration file .*run.yaml: No such file"),
        ("tau: [0.1\n", "run.yaml is not a YAML file"),
        (b"tau: \xff\xfe\n", "run.yaml is not a YAML file"),
        ("- tau\n- 0.1\n", "run.yaml must hold 'key: value' lines, not a list"),
        ("just text\n", "run.yaml must hold 'key: value' lines, not a str"),
        ("5: 3\n", "run.yaml must hold 'key: value' lines; the key 5 is not a name"),
        ("tau: 1\ntau: 2\n", "run.yaml is not a YAML file: tau is given twice\n.*line 2"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(message, file)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    refused("cannot read the configuration file", tmp_path)


def test_empty_files_and_dates_in_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert Config(MODEL, "toy", [file])["tau"] == Config(MODEL, "toy")["tau"]
    file.write_text("wandb_project: 2020-10-10\nlearning_rate: 1e-2\n")
    config = Config(MODEL, "toy", [file])
    assert (config["wandb_project"], config["learning_rate"]) == ("2020-10-10", 0.01)


def test_intervals_are_intervals() -> None:
    """RecBole warns at anything else, and then does not filter at all."""
    interval = Config(MODEL, "toy", overrides={"user_inter_num_interval": [2, 100]})
    assert interval["user_inter_num_interval"] == "[2,100]"
    with pytest.raises(
        UserError, match=r"user_inter_num_interval=5 .* must be an interval such as"
    ):
        Config(MODEL, "toy", overrides={"user_inter_num_interval": 5})


def test_a_file_that_names_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: SASRec\n")
    with pytest.raises(UserError, match=r"model='SASRec' \(.*mine.yaml\) contradicts --model"):
        Config(MODEL, "toy", [file])
    assert Config("SASRec", "toy", [file]).model == "SASRec"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topk": [10, 5.5]}, "must be whole numbers"),
        ({"clip_grad_norm": {"max": 1}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {"max_norm": "abc"}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {"max_norm": 0}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {"max_norm": True}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {"norm_type": 2}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {"max_norm": 1, "norm_type": "two"}}, "must be like {max_norm: 1.0}"),
        ({"clip_grad_norm": {}}, "must be like {max_norm: 1.0}"),
        ({"metrics": []}, r"metrics=\[\] must be names of metrics, e.g. \[Hit, NDCG\]"),
        ({"metrics": 5}, "metrics=5 must be names of metrics"),
        ({"metrics": [5]}, r"metrics=\[5\] must be names of metrics"),
        (
            {"metrics": ["Hitt"]},
            "'Hitt' is not one of averagepopularity, gauc, giniindex, hit,",
        ),
        ({"topk": []}, r"topk=\[\] must be whole numbers of at least 1"),
        ({"topk": "ten"}, "topk=ten must be whole numbers of at least 1"),
        ({"topk": [True]}, r"topk=\[True\] must be whole numbers of at least 1"),
        ({"worker": -1}, "worker=-1 must be at least 0"),
        ({"transform": "crop_itemseq"}, "transform=crop_itemseq is not available for SimDiffRec"),
        ({"seed": 2**32}, "must be at least 0, at most 4,294,967,295"),
        ({"show_users": -1}, "must be at least 0"),
        ({"state": "foo"}, "is not one of DEBUG, INFO"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
        ({"checkpoint_dir": None}, "checkpoint_dir=None must be text"),
    ],
)
def test_more_impossible_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(MODEL, "toy", overrides=values)


def test_a_local_ml_100k_goes_before_the_one_recbole_ships(tmp_path: Path) -> None:
    assert (
        "dataset_example"
        in Config(MODEL, "ml-100k", overrides={"data_path": str(tmp_path)})["data_path"]
    )
    (tmp_path / "ml-100k").mkdir()
    own = Config(MODEL, "ml-100k", overrides={"data_path": str(tmp_path)})
    assert own["data_path"] == str(tmp_path / "ml-100k")


# ---------------------------------------------------------------- DiffuASR and its backbone


def test_diffuasr_is_layered_over_its_backbone(tmp_path: Path) -> None:
    """The backbone's files first, each before the data set's, then DiffuASR's own."""
    file = tmp_path / "mine.yaml"
    file.write_text("diffuasr_strength: 0.7\ntau: 0.3\n")
    overrides = {"backbone": MODEL, "preset": "official", "n_heads": 4}
    config = Config("DiffuASR", "amazon-beauty", [file], overrides)
    assert (config.name, config.model, config.model_class.__name__) == ("DiffuASR", MODEL, MODEL)
    expected = {
        "learner": ("adam", "recbole/properties/overall.yaml"),
        "hidden_size": (64, f"properties/model/{MODEL}.yaml"),
        "MAX_ITEM_LIST_LENGTH": (50, "properties/dataset/amazon-beauty.yaml"),
        "cl_weight": (0.4, f"properties/tuned/amazon-beauty/{MODEL}.yaml"),
        "n_pseudo": (10, "properties/model/DiffuASR.yaml"),
        "diffuasr_sample_steps": (5, "properties/preset/DiffuASR/official.yaml"),
        "pseudo_mix": ("replace", "properties/preset/DiffuASR/official.yaml"),
        "diffuasr_strength": (0.7, str(file)),  # the preset says 1.0
        "tau": (0.3, str(file)),
        "n_heads": (4, "overrides"),
        "backbone": (MODEL, "overrides"),
    }
    for key, (value, origin) in expected.items():
        assert (config[key], config.origin[key]) == (value, origin), key
    assert {"diffuasr_epochs", "aug_items"} < {key for key, _, _ in config.explain()}
    plain = Config("DiffuASR", "amazon-beauty", overrides={"backbone": MODEL})
    assert plain.origin["preset"] == "properties/model/DiffuASR.yaml"  # both files have the key


def test_a_backbone_of_recbole_and_the_default_one(tmp_path: Path) -> None:
    config = Config("DiffuASR", "toy", overrides={"backbone": "GRU4Rec"})
    assert (config.model, config.origin["num_layers"]) == (
        "GRU4Rec",
        "recbole/properties/model/GRU4Rec.yaml",
    )
    assert "n_heads" not in config
    assert Config("DiffuASR", "toy").model == "SASRec"
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: BERT4Rec\n")
    assert Config("DiffuASR", "toy", [file]).model == "BERT4Rec"
    assert Config("DiffuASR", "toy", [file], {"backbone": "GRU4Rec"}).model == "GRU4Rec"
    assert Config("SASRec", "toy").name == "SASRec"


def test_a_backbone_must_be_a_recommender() -> None:
    refused("backbone=DiffuASR must be a recommender", model="DiffuASR", backbone="DiffuASR")
    for name in ("SASRek", None, 3):
        refused("is not a sequential model of recbole_simdiff", model="DiffuASR", backbone=name)


@pytest.mark.parametrize(
    ("backbone", "values"),
    [
        ("SASRec", {}),
        (MODEL, {"tau": 0.2, "k_noise": 4, "data_path": "/data", "seed": 3}),
        ("GRU4Rec", {"loss_type": "BPR", "learning_rate": 1}),
        ("GRU4Rec", {"eval_args": {"mode": "uni100"}, "topk": 5, "valid_metric": "NDCG@5"}),
        ("FPMC", {"train_neg_sample_args": {"distribution": "popularity"}, "embedding_size": 64}),
    ],
)
@pytest.mark.parametrize("dataset", ["toy", "amazon-beauty"])
def test_the_backbone_alone_is_configured_as_by_its_own_name(
    backbone: str, values: dict[str, Any], dataset: str
) -> None:
    """Else a gain would be one of other settings."""
    own = {"augmenter": "random", "preset": "official", "diffuasr_epochs": 9, "n_pseudo": 3}
    alone = Config("DiffuASR", dataset, overrides=own | values | {"backbone": backbone}).backbone()
    wanted = Config(backbone, dataset, overrides=values)
    assert (alone.name, alone.model) == (backbone, backbone)
    assert alone.plain() == wanted.plain()
    assert alone.final_config_dict == wanted.final_config_dict


def test_keys_of_the_backbone_are_known_and_typos_refused() -> None:
    def diffuasr(message: str, **overrides: Any) -> None:
        refused(message, model="DiffuASR", **overrides)

    diffuasr(
        r"unknown key 'n_psuedo' \(command line\) for model=DiffuASR; did you mean n_pseudo\? "
        "'list --explain --model=DiffuASR' shows every key",
        n_psuedo=3,
    )
    assert Config("DiffuASR", "toy", overrides={"backbone": MODEL, "tau": 0.2})["tau"] == 0.2
    diffuasr("unknown key 'tau' .* for model=DiffuASR", tau=0.2)  # the default is SASRec
    diffuasr("tau='warm' .* must be a number", backbone=MODEL, tau="warm")
    diffuasr("tau=0.0 must be positive", backbone=MODEL, tau=0)  # the backbone's own check
    diffuasr("n_pseudo=0 must be at least 1", n_pseudo=0)
    refused("unknown key 'n_pseudo' .* for model=SASRec", model="SASRec", n_pseudo=3)


def test_a_file_may_name_diffuasr(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: DiffuASR\nbackbone: GRU4Rec\n")
    assert Config("DiffuASR", "toy", [file]).model == "GRU4Rec"
    file.write_text("model: SASRec\n")
    refused("model='SASRec' .* contradicts --model=DiffuASR", file, model="DiffuASR")


def test_presets_of_diffuasr() -> None:
    """They are its own, whatever the backbone is."""
    for backbone in ("SASRec", MODEL):
        config = Config("DiffuASR", "toy", overrides={"backbone": backbone, "preset": "official"})
        assert (config["diffuasr_cg_sign"], config["pseudo_at_evaluation"]) == ("flipped", True)
    refused(
        "preset='wo_c_aug' .* is not one of paper, official$",
        model="DiffuASR",
        backbone=MODEL,
        preset="wo_c_aug",
    )


def test_a_diffuasr_configuration_is_restored_whole() -> None:
    for values in ({"backbone": "GRU4Rec"}, {"backbone": MODEL, "preset": "official", "tau": 0.2}):
        config = Config("DiffuASR", "amazon-beauty", overrides=values)
        plain = json.loads(json.dumps(config.plain()))
        assert plain["model"] == "DiffuASR"
        again = Config(plain["model"], plain["dataset"], overrides=plain["values"])
        assert again.final_config_dict == config.final_config_dict
        assert (again.name, again.model) == (config.name, config.model)


@pytest.mark.parametrize("groups", [[20, 5], [5, 5], [5.0], ["a"], [True, 5], [0, 5], [-1], 5, "5"])
def test_length_groups_must_rise(groups: Any) -> None:
    refused("length_groups=.* must be increasing whole numbers", length_groups=groups)


def test_length_groups() -> None:
    assert Config("SASRec", "toy")["length_groups"] == [5, 20]
    for groups in ([], [1], [3, 10, 30]):
        assert Config(MODEL, "toy", overrides={"length_groups": groups})["length_groups"] == groups


# ---------------------------------------------------------------- models by name


def test_every_recommender_that_a_file_defines_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it imports, and its other classes, are none."""
    (tmp_path / "pair.py").write_text(
        "from recbole.model.sequential_recommender import GRU4Rec\n"
        "from recbole_simdiff.modules.encoder import EncoderRecommender\n"
        "class Helper: pass\n"
        "class First(EncoderRecommender): pass\n"
        "class Second(First): pass\n"
    )
    before = models.plugin_models()
    assert MODEL in before
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    found = models.plugin_models()
    monkeypatch.delitem(sys.modules, "recbole_simdiff.models.pair")
    assert set(found) - set(before) == {"First", "Second"}
    assert "GRU4Rec" not in found


def test_a_derived_model_reads_the_files_of_its_base_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own win, layer by layer; what they leave out is the base's."""

    class Derived(models.get_model(MODEL)):  # type: ignore[misc]
        pass

    stock = models.plugin_models()
    monkeypatch.setattr(lookup, "plugin_models", lambda: {**stock, "Derived": Derived})
    monkeypatch.setattr(lookup, "get_model", lambda name: Derived)
    shutil.copytree(properties_dir(), tmp_path / "properties")
    (tmp_path / "properties/model/Derived.yaml").write_text("tau: 0.9\nlambda_new: 1.0\n")
    monkeypatch.setattr(config_module, "properties_dir", lambda: tmp_path / "properties")
    config = Config("Derived", "amazon-beauty", overrides={"lambda_new": 2})
    for key, value, origin in (
        ("tau", 0.9, "model/Derived.yaml"),
        ("n_layers", 2, f"model/{MODEL}.yaml"),
        ("cl_weight", 0.4, f"tuned/amazon-beauty/{MODEL}.yaml"),
    ):
        assert (config[key], config.origin[key]) == (value, f"properties/{origin}")
    assert config["lambda_new"] == 2.0
    refused("for model=Derived; did you mean lambda_new", model="Derived", lambda_nwe=1)
