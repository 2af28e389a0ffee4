"""Every yaml under properties/: it loads, names known keys only, and says what the paper says."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import recbole

from recbole_simdiff.config import config as config_module
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.config.lookup import layers
from recbole_simdiff.models.registry import WRAPPERS, available_models, plugin_models

FOLDER = properties_dir()
MODELS = sorted(plugin_models())
# Ours, and corrections of RecBole's; that of the encoder is part of its models' defaults.
MODEL_FILES = sorted(
    set((FOLDER / "model").glob("*.yaml")) - {FOLDER / "model/EncoderRecommender.yaml"}
)
DATASETS = sorted(path.stem for path in (FOLDER / "dataset").glob("*.yaml"))
TUNED = sorted((FOLDER / "tuned").glob("*/*.yaml"))
PRESETS = sorted((FOLDER / "preset").glob("*/*.yaml"))
SOURCE = "\n".join(
    path.read_text() for path in sorted(Path(config_module.__file__).parents[1].rglob("*.py"))
)


def short(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def test_every_file_is_seen() -> None:
    """The other tests glob; this one knows how many files there are at least, and of what kind."""
    assert len(MODELS) >= 1
    assert len(DATASETS) >= 6
    assert len(TUNED) >= 7
    assert len(PRESETS) >= 4
    experiments, spaces = FOLDER.glob("experiment/*.yaml"), FOLDER.glob("search_space/*.hyper")
    assert {path.stem for path in MODEL_FILES} >= set(MODELS)
    seen = {FOLDER / "overall.yaml", FOLDER / "statistics.yaml", *MODEL_FILES, *TUNED, *PRESETS}
    seen |= {FOLDER / "downloads.yaml"}  # see tests/data/test_download.py
    seen |= {FOLDER / "model/EncoderRecommender.yaml"}  # a layer of other models, and none itself
    seen |= {*experiments, *spaces}  # see tests/experiments
    seen |= {FOLDER / "dataset" / f"{name}.yaml" for name in DATASETS}
    assert seen == {path for path in FOLDER.rglob("*") if path.is_file()}
    assert len(seen) >= 19


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_each_data_set_loads_with_each_model(dataset: str, model: str) -> None:
    config = Config(model, dataset)
    own = read_yaml(FOLDER / "dataset" / f"{dataset}.yaml")
    for layer in layers(config.model_class):  # a variant takes its base model's, too
        tuned = FOLDER / "tuned" / dataset / f"{layer}.yaml"
        own |= read_yaml(tuned) if tuned.is_file() else {}
    assert own
    assert {key: config[key] for key in own} == own


@pytest.mark.parametrize("path", TUNED, ids=short)
def test_each_tuned_file_loads_and_names_known_keys(path: Path) -> None:
    dataset, model = path.parent.name, path.stem
    assert dataset in DATASETS
    assert model in available_models()
    content = read_yaml(path)
    config = Config(model, dataset)
    for key, value in content.items():
        assert config[key] == value
        assert config.origin[key] == f"properties/tuned/{dataset}/{model}.yaml"
    Config(model, "toy", [path])  # given by hand, unknown keys and wrong types are refused


@pytest.mark.parametrize("path", MODEL_FILES, ids=short)
def test_each_model_file_loads(path: Path) -> None:
    content = read_yaml(path)
    assert content
    config = Config(path.stem, "toy")
    assert {key: config[key] for key in content} == content
    assert {config.origin[key] for key in content} == {f"properties/model/{path.name}"}


@pytest.mark.parametrize("path", PRESETS, ids=short)
def test_each_preset_loads_and_names_known_keys(path: Path) -> None:
    model, content = path.parent.name, read_yaml(path)
    assert model in (*MODELS, *WRAPPERS)
    config = Config(model, "toy", overrides={"preset": path.stem})
    plain = Config(model, "toy")
    for key, value in content.items():
        assert config[key] == value
    assert any(config[key] != plain[key] for key in content)
    Config(model, "toy", [path])


@pytest.mark.parametrize("model", sorted({*MODELS} - {"EASE", "ItemKNN", "Pop"}))  # no Transformers
@pytest.mark.parametrize("dataset", DATASETS)
def test_data_set_files_name_known_keys(dataset: str, model: str) -> None:
    Config(model, "toy", [FOLDER / "dataset" / f"{dataset}.yaml"])


@pytest.mark.parametrize("name", ["overall", *(f"model/{model}" for model in (*MODELS, *WRAPPERS))])
def test_every_default_has_a_reader(name: str) -> None:
    """A key that neither RecBole nor the package reads is a knob that turns nothing."""
    host = Path(recbole.__file__).parent / "properties"
    known = set(read_yaml(host / "overall.yaml")) | set(read_yaml(host / "dataset/sample.yaml"))
    keys = read_yaml(FOLDER / f"{name}.yaml")
    assert keys
    dead = [key for key in keys if key not in known and f'"{key}"' not in SOURCE]
    assert dead == []


@pytest.mark.parametrize("dataset", DATASETS)
def test_data_sets_load_what_sequences_need(dataset: str) -> None:
    config = Config("SASRec", dataset)
    fields = {config[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")}
    assert fields == set(config["load_col"]["inter"])
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"}
    assert config["eval_args"]["order"] == "TO"
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    assert config["repeatable"] is True


def test_published_statistics_are_those_of_data_sets_with_settings() -> None:
    content = read_yaml(FOLDER / "statistics.yaml")
    assert sorted(content) == DATASETS
    for name, rows in content.items():
        for row in rows:
            counts = [row.pop(key) for key in ("users", "items", "actions")]
            assert all(type(count) is int and count > 0 for count in counts), name
            assert counts[2] < counts[0] * counts[1]
            assert set(row) == {"source", "note"}
        assert rows


# ---------------------------------------------------------------- comments


@pytest.mark.parametrize("path", MODEL_FILES, ids=short)
def test_every_key_of_a_model_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    keys = [line for line in lines if line and line[0] not in "# "]
    assert len(keys) == len(read_yaml(path))
    assert [line for line in keys if not line.partition("#")[2].strip()] == []


@pytest.mark.parametrize("path", [*TUNED, *PRESETS], ids=short)
def test_other_files_begin_by_saying_where_their_values_come_from(path: Path) -> None:
    assert path.read_text().startswith("# ")


# ---------------------------------------------------------------- the paper's settings

CORE = "[5,inf)"
# L (Sec. 5.1.4), both loss weights (Sec. 5.4), k_noise and k_sample (Sec. 5.5); dropout, which the
# paper does not give, is that of the related scripts.
PAPER = {
    "amazon-beauty": (50, 0.4, 0.4, 30, 2, 0.5, 0.5),
    "amazon-toys-games": (50, 0.1, 0.1, 30, 2, 0.5, 0.5),
    "amazon-sports-outdoors": (50, 0.1, 0.1, 3, 2, 0.5, 0.5),
    "yelp": (50, 0.1, 0.1, 5, 2, 0.2, 0.1),
    "ml-1m": (200, 0.1, 0.1, 2, 5, 0.2, 0.2),
}
BEST_K_NOISE = {  # Sec. 5.5
    "amazon-beauty": range(25, 51),
    "amazon-toys-games": range(25, 51),
    "amazon-sports-outdoors": range(1, 6),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_settings_of_the_paper_per_data_set(dataset: str) -> None:
    config = Config("SimDiffRec", dataset)
    keys = ("MAX_ITEM_LIST_LENGTH", "cl_weight", "diff_weight", "k_noise", "k_sample")
    keys += ("hidden_dropout_prob", "attn_dropout_prob")
    assert tuple(config[key] for key in keys) == PAPER[dataset]
    assert config["user_inter_num_interval"] == CORE
    assert config["item_inter_num_interval"] == CORE
    # Repeated visits stay on Yelp only.
    assert config["rm_dup_inter"] == (None if dataset == "yelp" else "first")
    if dataset in BEST_K_NOISE:
        assert config["k_noise"] in BEST_K_NOISE[dataset]
    assert 0.1 <= config["cl_weight"] <= 0.5
    assert 0.1 <= config["diff_weight"] <= 0.5


def test_length_and_filters_hold_for_every_model() -> None:
    """They belong to the data set: a baseline on other data would not be comparable."""
    for dataset, (length, *_) in PAPER.items():
        config = Config("SASRec", dataset)
        assert config["MAX_ITEM_LIST_LENGTH"] == length
        assert config["user_inter_num_interval"] == config["item_inter_num_interval"] == CORE


def test_yelp_is_the_reviews_of_2019() -> None:
    config = Config("SimDiffRec", "yelp")
    assert (config["ITEM_ID_FIELD"], config["TIME_FIELD"]) == ("business_id", "date")
    first, last = datetime(2019, 1, 1, tzinfo=UTC), datetime(2019, 12, 31, tzinfo=UTC)
    window = f"[{first.timestamp():.0f},{last.timestamp():.0f}]"
    assert config["val_interval"] == {"date": window}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layers", 2),
        ("n_heads", 2),
        ("hidden_size", 64),
        ("inner_size", 256),
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-12),
        ("initializer_range", 0.02),
        ("loss_type", "CE"),
        ("sr_loss", "CE"),
        ("train_sampling", "user_all"),
        ("noise_source", "similarity"),
        ("noise_refresh", "batch"),
        ("noise_detach", True),
        ("diffusion_steps", 1000),
        ("forward_coef", "vp_zsnr"),
        ("beta_start", 1e-4),
        ("beta_end", 0.02),
        ("denoiser_layers", 1),
        ("denoiser_heads", 2),
        ("share_denoiser_encoder", False),
        ("time_embedding", "sinusoidal"),
        ("diff_mse_weight", 1),
        ("diff_round_weight", 1),
        ("mse_detach_target", False),
        ("pad_in_diffusion_loss", False),
        ("confidence_t", "T"),
        ("reverse_steps", 1),
        ("aug_ratio", 0.2),
        ("aug_count", "ratio_of_length"),
        ("aug_position", "confidence"),
        ("aug_items", "denoiser"),
        ("aug_dropout", False),
        ("pos_exclude_original", False),
        ("neg_exclude_original", False),
        ("tau", 0.05),
        ("cl_negatives", "pos_and_hard"),
        ("cl_warmup_epochs", 0),
        ("train_batch_size", 256),
        ("learning_rate", 1e-3),
        ("weight_decay", 0),
        ("learner", "adam"),
        ("epochs", 300),
        ("stopping_step", 10),
        ("valid_metric", "NDCG@10"),
        ("topk", [5, 10, 20]),
    ],
)
def test_defaults_of_the_paper(key: str, value: Any) -> None:
    assert Config("SimDiffRec", "toy")[key] == value


def test_the_released_behaviour() -> None:
    """Everything in which the released code differs from the paper's text, and nothing else."""
    released = {
        "train_sampling": "prefix_all",
        "noise_detach": False,
        "denoiser_layers": 2,
        "share_denoiser_encoder": True,
        "time_embedding": "learned",
        "diff_mse_weight": 0,
        "rounding": "tied",
        "pad_in_diffusion_loss": True,
        "confidence_t": "train_t",
        "aug_count": "fixed",
        "aug_items": "random",
        "aug_dropout": True,
        "train_batch_size": 2048,
        "valid_metric": "MRR@10",
    }
    official = Config("SimDiffRec", "toy", overrides={"preset": "official"})
    assert official["reverse_steps"] == 1
    paper = Config("SimDiffRec", "toy")
    differing = {
        key: value
        for key, value in official.final_config_dict.items()
        if paper[key] != value and key != "preset"
    }
    assert differing == released


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("wo_k_noise", {"noise_source": "gaussian"}),
        ("wo_c_aug", {"aug_position": "random"}),
        ("wo_k_sample", {"cl_negatives": "pos_only"}),
    ],
)
def test_ablations_change_one_thing(preset: str, change: dict[str, Any]) -> None:
    ablated = Config("SimDiffRec", "toy", overrides={"preset": preset})
    paper = Config("SimDiffRec", "toy")
    differing = {k: v for k, v in ablated.final_config_dict.items() if paper[k] != v}
    assert differing == change | {"preset": preset}
