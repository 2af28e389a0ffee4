"""RecBole's own sequential models on our loaders, trainer and evaluation: fair baselines."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import recbole.model.sequential_recommender
import torch
from recbole.data import data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.trainer import Trainer
from recbole.utils import init_seed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recbole_simdiff import evaluate
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import PROTOCOLS, REMOVED
from recbole_simdiff.models import registry as models
from recbole_simdiff.models.registry import build_model, recbole_models
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter
from tests.contract import check_item_table, check_sampling, check_training

SMALL = {
    "MAX_ITEM_LIST_LENGTH": 10,
    "hidden_size": 8,
    "inner_size": 8,
    "embedding_size": 8,
    "train_batch_size": 2048,
    "eval_batch_size": 1024,
    "epochs": 1,
    "pretrain_epochs": 1,
    "use_gpu": False,
    "show_progress": False,
    "user_inter_num_interval": "[300,inf)",  # every model builds in a second
}
# These read item features, which ml-100k has as genres.
FEATURES = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
}
WITH_FEATURES = {"DIN", "FDSA", "GRU4RecF", "S3Rec", "SASRecF"}
# RecBole builds a data set of their own kind for these: labels, or a knowledge graph.
REFUSED = {"DIEN", "GRU4RecKG", "KSR"}
# These rank by another score than they predict, or do one of both only.
TWO_SCORES = {"CORE", "DIN", "GRU4RecCPR", "SASRecCPR"}
# Parameters that RecBole makes and its losses do not read, or not with these settings.
UNUSED = {
    "DIN": {"embedding_layer"},
    "FDSA": {"feature_att_layer"},
    "GRU4RecCPR": {"project_emb"},
    "NPE": {"embedding_seq_item"},
    "RepeatNet": {"repeat_recommendation_decoder"},
    "SASRecCPR": {"project_emb"},
}
# Biases that shift all logits of a softmax: their gradient is rounding, on some processors 0.
SHIFTS = {"CORE": "net."}
TRAINED = ["SASRec", "BERT4Rec", "GRU4Rec", "S3Rec", "FEARec"]


def make_config(model: str, folder: Path, **changes: Any) -> Config:
    """Small settings for ml-100k, as far as the model knows them."""
    known = set(Config(model, "ml-100k").final_config_dict)
    values = SMALL | {"checkpoint_dir": str(folder / "saved")}
    if model in WITH_FEATURES:
        values |= FEATURES
    values = {key: value for key, value in values.items() if key in known} | changes
    return Config(model, "ml-100k", overrides=values)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """On models this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=pytest.mark.slow if m == "FEARec" else ()) for m in TRAINED],
)
def test_one_epoch_and_its_test(tmp_path: Path, model: str) -> None:
    result = run(make_config(model, tmp_path, user_inter_num_interval="[250,inf)"))
    assert result.statistics["users"] > 80
    folder = Path(result.run_dir)
    assert {BEST, LAST, RESULT} <= {path.name for path in folder.iterdir()}
    stored = json.loads((folder / RESULT).read_text())
    assert [entry["phase"] for entry in stored["log"]] == (
        ["pretrain", "finetune"] if model == "S3Rec" else ["train"]
    )
    for part in (stored["valid"], stored["test"]):
        assert tuple(part) == PROTOCOLS
        for metrics in part.values():
            assert all(0 <= value <= 1 for value in metrics.values())
    assert stored["test"][REMOVED]["hit@20"] > 0
    for entry in stored["log"]:
        assert all(math.isfinite(value) and value > 0 for value in entry["loss"].values())
    events = EventAccumulator(str(tmp_path / "log_tensorboard" / folder.name))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value)) for e in events.Scalars("Loss/Train")]
    assert [(n, sum(entry["loss"].values())) for n, entry in enumerate(stored["log"])] == shown
    last = len(stored["log"]) - 1  # S3Rec's first phase is not validated
    (score,) = events.Scalars("Vaild_score")
    assert (score.step, score.value) == (
        last,
        pytest.approx(stored["log"][last]["valid"]["ndcg@10"]),
    )
    again = evaluate(folder)
    assert (again.valid, again.test) == (stored["valid"], stored["test"])


def test_the_lists_above_name_models_of_recbole() -> None:
    assert len(recbole_models()) == 31
    assert WITH_FEATURES | REFUSED | set(TRAINED) <= recbole_models().keys()


@pytest.mark.parametrize("model", sorted(recbole_models().keys() - REFUSED))
def test_every_other_model_keeps_the_contract(tmp_path: Path, model: str) -> None:
    """Built, it is of RecBole's class, trains by its plan, and says that it draws nothing."""
    config = make_config(model, tmp_path, train_batch_size=64)
    dataset = create_dataset(config)
    train_data, valid_data, _ = create_loaders(config, dataset)
    torch.manual_seed(0)
    network = build_model(config, train_data._dataset)
    assert isinstance(network, getattr(recbole.model.sequential_recommender, model))
    assert isinstance(network, SequentialModel)
    batch = next(iter(train_data))
    unmoved = {
        name
        for name in check_training(network, batch)
        if not (name.startswith(SHIFTS.get(model, "-")) and name.endswith(".bias"))
    }
    assert {name.split(".")[0] for name in unmoved} == UNUSED.get(model, set())
    check_item_table(network, dataset.item_num)
    ranks_only = model in {"GRU4RecCPR", "SASRecCPR"}
    score = network.full_sort_predict if ranks_only else network.predict
    check_sampling(network, batch, score)
    if model not in TWO_SCORES:
        scores = network.full_sort_predict(batch).view(len(batch), -1)
        column = scores.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(network.predict(batch).view(-1), column)
    assert network.augmented_views(batch) == {}
    assert not network.data_parallel
    found = PlanTrainer(config, network, tmp_path / "run").evaluator.evaluate(valid_data)
    assert tuple(found) == PROTOCOLS


@pytest.mark.parametrize(
    ("model", "one_pass"),
    [("SASRec", True), ("GRU4Rec", True), ("CORE", False), ("DIN", False), ("SASRecCPR", True)],
)
def test_candidates_cost_a_pass_each_only_where_it_matters(
    tmp_path: Path, model: str, one_pass: bool
) -> None:
    """CORE ranks by another score than it predicts, DIN only predicts, SASRecCPR only ranks."""
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni9"}
    config = make_config(model, tmp_path, eval_args=split)
    train_data, valid_data, _ = create_loaders(config, create_dataset(config))
    torch.manual_seed(0)
    trainer = PlanTrainer(config, build_model(config, train_data._dataset), tmp_path / "run")
    passes = []
    stock = trainer.evaluator._predicted_scores
    trainer.evaluator._predicted_scores = lambda *given: passes.append(given) or stock(*given)  # type: ignore
    (found,) = trainer.evaluator.evaluate(valid_data).values()
    assert 0 < found["mrr@10"] < 1
    # To try one pass takes one call; DIN fails before.
    assert len(passes) == 1 + (0 if one_pass else len(valid_data) - (model == "DIN"))


@pytest.mark.parametrize("model", ["S3Rec", "FDSA"])
def test_a_model_that_reads_more_than_is_loaded_says_so(tmp_path: Path, model: str) -> None:
    load_col = {"inter": ["user_id", "item_id", "timestamp"]}
    config = make_config(model, tmp_path, load_col=load_col)
    with pytest.raises(UserError, match=r"class would take no part.*load_col=.*item"):
        build_model(config, create_dataset(config).build()[0])


@pytest.fixture
def emb(tmp_path: Path) -> Any:
    """emb(model, key=value, ...) -> a config for eight users and six items with two features."""
    sequences = {f"u{u}": [f"i{(u + k) % 6}" for k in range(5)] for u in range(8)}
    path = write_inter(tmp_path, "emb", sequences)
    lines = ["item_id:token\tbrand:token\temb:float_seq\tprice:float"]
    lines += [f"i{k}\tb{k % 2}\t{k / 10} {-k / 10} 0.5\t{k}" for k in range(6)]
    path.with_suffix(".item").write_text("\n".join(lines) + "\n")
    columns = {"item": ["item_id", "brand", "emb", "price"]}

    def make(model: str, **values: Any) -> Config:
        values = {
            "data_path": str(tmp_path),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], **columns},
            "topk": [2],
            "valid_metric": "NDCG@2",
            "epochs": 1,
            "use_gpu": False,
            "show_progress": False,
            "checkpoint_dir": str(tmp_path / "saved"),
        } | values
        return Config(model, "emb", overrides=values)

    return make


def first_loss(config: Config) -> float:
    """Of a fresh model on its first batch."""
    init_seed(0, True)
    train_data, _, _ = create_loaders(config, create_dataset(config))
    network = build_model(config, train_data._dataset)
    network.eval()
    return float(network.calculate_loss(next(iter(train_data))))


@pytest.mark.parametrize("model", ["FDSA", "GRU4RecF", "SASRecF"])
def test_features_that_are_numbers_take_part(emb: Any, model: str) -> None:
    """Their loss moves with the values of the column, which RecBole passes over."""
    for column in ("price", *(["emb"] if model != "SASRecF" else [])):
        features = {"selected_features": ["brand", column], "numerical_features": [column]}
        config = emb(model, **features)
        path = Path(config["data_path"]) / "emb.item"
        before, text = first_loss(config), path.read_text()
        path.write_text(text.replace("0.5", "7.5").replace("\t5\n", "\t9\n"))
        assert first_loss(config) != before
        path.write_text(text)


@pytest.mark.parametrize(
    ("model", "features", "message"),
    [
        (
            "FDSA",
            {"selected_features": ["brand", "emb"]},
            "emb would .* only if numerical_features",
        ),
        ("GRU4RecF", {"selected_features": ["emb"]}, "emb would .* only if numerical_features="),
        ("SASRecF", {"selected_features": ["price"]}, "it is float, .* only if numerical_features"),
        (
            "SASRecF",
            {"selected_features": ["emb"], "numerical_features": ["emb"]},
            "SASRecF cannot take float_seq; GRU4RecF and FDSA can",
        ),
        ("FDSA", {"selected_features": ["timestamp"]}, "timestamp .* no column of the .item file"),
        (
            "FDSA",
            {"selected_features": ["color"]},
            "color .* is not loaded. .*load_col=.* under ite",
        ),
        ("FDSA", {"selected_features": []}, "must name a column of the .item file"),
        (
            "S3Rec",
            {"item_attribute": "price"},
            "it is float, and attributes are token or token_seq",
        ),
        (
            "S3Rec",
            {"item_attribute": "emb"},
            "it is float_seq, and attributes are token or token_s",
        ),
    ],
)
def test_features_that_would_take_no_part_are_refused(
    emb: Any, model: str, features: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(emb(model, **features))
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            "GRU4RecCPR",
            {"n_facet": 7, "reranker_CAN_NUM": 2},
            "cannot be built of its settings: a condition of gru4reccpr",
        ),
        ("SASRecCPR", {}, "reranker_CAN_NUM=100 candidates must not exceed the 6 items"),
        ("FPMC", {"loss_type": "CE"}, r"cannot be built of its settings: Make sure 'loss_type' in"),
        (
            "FOSSIL",
            {"order_len": 70},
            "cannot be built of its settings: order_len can't longer than",
        ),
        ("SASRec", {"n_heads": 3}, "hidden size .64. is not a multiple of the number of attention"),
    ],
)
def test_settings_that_recbole_refuses(
    emb: Any, model: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        first_loss(emb(model, **values))


@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("SASRec", {"hidden_size": 10**6}),
        ("SASRec", {"MAX_ITEM_LIST_LENGTH": 10**6, "hidden_size": 2**20, "n_heads": 1}),
        ("SimDiffRec", {"hidden_size": 10**6, "k_noise": 2}),
        ("GRU4Rec", {"embedding_size": 2**20, "hidden_size": 2**20}),
    ],
)
def test_sizes_beyond_the_memory_are_refused(emb: Any, model: str, values: dict[str, Any]) -> None:
    """Before anything of that size is made, whatever the system would promise."""
    with pytest.raises(UserError, match=r"needs [\d,.]+ GiB or more for its weights; .*_size=\d+"):
        first_loss(emb(model, **values))


def test_layers_that_are_copies_count(emb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole's Transformers copy their first layer."""
    config = emb("SASRec", n_layers=20)
    data = create_dataset(config).build()[0]
    network = build_model(config, data)
    weights = sum(p.numel() * p.itemsize for p in network.parameters())
    monkeypatch.setattr(models, "_memory", lambda: weights * 0.8)
    with pytest.raises(UserError, match="for its weights"):
        build_model(config, data)
    monkeypatch.setattr(models, "_memory", lambda: weights * 1.5)
    build_model(config, data)


def test_a_share_of_the_users_where_the_model_reads_all_rows(tmp_path: Path, capsys: Any) -> None:
    """FEARec reads the sequences of the whole training part when it is made."""
    config = make_config("FEARec", tmp_path, train_fraction=0.5)
    train_data, _, _ = create_loaders(config, create_dataset(config))
    rows = train_data._dataset.inter_feat
    network = build_model(config, train_data._dataset)
    assert capsys.readouterr().out == ""
    assert len(rows["item_id_list"]) == len(rows) > 0
    assert network.calculate_loss(next(iter(train_data))).item() > 0


@pytest.mark.parametrize(
    ("model", "rows"), [("SASRec", 64), ("RepeatNet", 64), ("DIN", 64), ("FPMC", 64)]
)
def test_negatives_are_drawn_where_the_loss_needs_them(
    tmp_path: Path, model: str, rows: int
) -> None:
    """DIN labels drawn rows 0; FPMC compares with them; the softmax models get none."""
    config = make_config(model, tmp_path, train_batch_size=64)
    train_data, _, _ = create_loaders(config, create_dataset(config))
    batch = next(iter(train_data))
    assert len(batch) == rows
    assert ("neg_item_id" in batch) == (model == "FPMC")
    assert ("label" in batch) == (model == "DIN")
    if model == "DIN":
        assert batch["label"].mean().item() == 0.5


@pytest.mark.parametrize("model", sorted(REFUSED))
def test_models_with_a_data_set_of_their_own_are_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match=rf"model={model} needs RecBole's {model}Dataset, which is"):
        run(make_config(model, tmp_path))


# ---------------------------------------------------------------------- parity


class Stock(RecBoleFixes, SequentialDataset):
    """RecBole's data set with only what today's pandas needs."""


def first_epoch(trainer: Trainer, train_data: Any) -> float:
    """RecBole's own training loop; the sum of the batches' losses."""
    return float(trainer._train_epoch(train_data, 0))


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "FPMC"])
def test_the_baseline_trains_as_in_recbole(tmp_path: Path, make: Any, model: str) -> None:
    """From the same seed: the same rows in the same order, so the same loss and the same weights.

    On positions for times, which RecBole's float32 holds exactly; FPMC draws negatives, too.
    """
    config = make(model)
    init_seed(config["seed"], config["reproducibility"])
    stock_data = data_preparation(config, Stock(config))[0]
    init_seed(config["seed"], config["reproducibility"])
    stock = Trainer(config, config.model_class(config, stock_data._dataset))
    wanted = first_epoch(stock, stock_data)

    init_seed(config["seed"], config["reproducibility"])
    our_data = create_loaders(config, create_dataset(config))[0]
    init_seed(config["seed"], config["reproducibility"])
    ours = Trainer(config, config.model_class(config, our_data._dataset))
    assert first_epoch(ours, our_data) == wanted

    init_seed(config["seed"], config["reproducibility"])
    our_data = create_loaders(config, create_dataset(config))[0]
    init_seed(config["seed"], config["reproducibility"])
    plan = PlanTrainer(config, config.model_class(config, our_data._dataset), tmp_path / "run")
    plan._train_epoch(our_data, 0)
    assert plan.progress.loss_sums["loss"] == pytest.approx(wanted, rel=1e-12)
    for name, tensor in stock.model.state_dict().items():
        assert torch.equal(plan.model.state_dict()[name], tensor), name


@pytest.fixture
def make(data_path: Path, tmp_path: Path) -> Any:
    """make(model) -> config on toy."""

    def config(model: str) -> Config:
        known = set(Config(model, "ml-100k").final_config_dict)
        values = SMALL | {
            "data_path": str(data_path),
            "checkpoint_dir": str(tmp_path / "saved"),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": 4,
            "train_batch_size": 4,
            "user_inter_num_interval": None,
        }
        return Config(model, "toy", overrides={k: v for k, v in values.items() if k in known})

    return config
