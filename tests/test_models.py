"""Models by name, and the contract that every model of this package keeps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.loaders import BucketLoader
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.collector import TargetCollector
from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.models.registry import (
    available_models,
    get_model,
    plugin_models,
    recbole_models,
)
from recbole_simdiff.modules.fitted import FittedModel
from recbole_simdiff.runs.run import _payload
from recbole_simdiff.serving.recommender import load
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter
from tests.contract import check_item_table, check_sampling, check_training, check_views

MODELS = sorted(plugin_models())
TRAINED = [name for name in MODELS if not issubclass(get_model(name), FittedModel)]
LONGER = 9  # positions of a batch padded beyond its longest row


def test_models_are_found() -> None:
    assert "SimDiffRec" in MODELS
    assert {"SASRec", "GRU4Rec", "BERT4Rec", "S3Rec", "FPMC"} <= set(recbole_models())
    assert available_models() == [*MODELS, *sorted(recbole_models())]
    for name in available_models():
        found = get_model(name)
        assert found.__name__ == name
        package = "recbole_simdiff.models" if name in MODELS else "recbole.model.sequential_reco"
        assert found.__module__.startswith(package)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("simdiffrec", "SimDiffRec"), ("SasRec", "SASRec"), ("Bert4Rec", "BERT4Rec")],
)
def test_unknown_names_get_the_nearest(name: str, nearest: str) -> None:
    message = (
        f"model='{name}' is not a sequential model of .* Did you mean {nearest}.* 'list' names"
    )
    with pytest.raises(UserError, match=message):
        get_model(name)


@pytest.mark.parametrize("name", ["Xyzzy", "BPR", ""])
def test_names_like_no_other(name: str) -> None:
    """BPR is a model of RecBole, but not a sequential one."""
    with pytest.raises(UserError, match=f"model='{name}' is not a sequential model of"):
        get_model(name)


# ---------------------------------------------------------------- the contract

by_gradient = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def made(build: Any, make_config: Any, name: str) -> Any:
    """(config, training loader, test loader, model): every loss weight positive."""
    weights = [key for key in read_yaml(properties_dir() / f"model/{name}.yaml") if "weight" in key]
    values = {key: make_config(name)[key] or 0.1 for key in weights}
    config, train, _, test, model = build(name, MAX_ITEM_LIST_LENGTH=LONGER, **values)
    if isinstance(model, FittedModel):
        model.fit(train._dataset)
    return config, train, test, model


def longest_batch(loader: Any) -> Interaction:
    """A batch whose longest row is shorter than the maximum, so that it can be padded."""
    return max(loader, key=lambda batch: batch["item_id_list"].shape[1])


def padded(batch: Interaction) -> Interaction:
    items = batch["item_id_list"]
    assert items.shape[1] < LONGER
    more = torch.nn.functional.pad(items, (0, LONGER - items.shape[1]))
    return Interaction({**batch.interaction, "item_id_list": more})


def total(losses: Any) -> torch.Tensor:
    return sum(losses) if isinstance(losses, tuple) else losses


def test_there_are_models_to_test() -> None:
    assert len(MODELS) >= 1


def test_every_user_counts_and_a_ranking_without_the_history_is_no_worse(
    make_config: Any, build: Any, name: str, data_path: Path
) -> None:
    """Where nobody meets an item twice; scores are the same under both protocols."""
    histories = {f"u{n}": [f"i{(3 * n + k) % 31}" for k in range(4 + n % 5)] for n in range(25)}
    write_inter(data_path, "once", histories)
    values = {"MAX_ITEM_LIST_LENGTH": LONGER, "topk": [1, 5, 31], "valid_metric": "NDCG@5"}
    known = set(Config(name, "ml-100k").final_config_dict)
    values |= {"k_noise": 3, "k_sample": 2} if "k_noise" in known else {}
    config, train, _, test, model = build(name, "once", **values)
    if isinstance(model, FittedModel):
        model.fit(train._dataset)
    found = PlanTrainer(config, model, Path("run")).evaluator.evaluate(test)
    for metric, value in found[KEPT].items():
        assert found[REMOVED][metric] >= value
    assert found[REMOVED] != found[KEPT]
    assert found[KEPT]["hit@31"] == 1  # each of the 25 users, among all 31 items


@pytest.mark.parametrize("style", ["user_all", "prefix_last", "prefix_all"])
def test_it_trains_on_rows_of_every_kind(build: Any, name: str, style: str) -> None:
    """DuoRec needs one target a row for views of the same target, and has others."""
    values = {"contrast": "un"} if (name, style) == ("DuoRec", "user_all") else {}
    config, train, _, _, model = build(name, train_sampling=style, **values)
    PlanTrainer(config, model, Path("run")).fit(train)
    if isinstance(model, FittedModel):
        assert model.scores(next(iter(train))["item_id_list"]).std() > 0
        return
    losses = total(model.calculate_loss(next(iter(train))))
    assert losses.isfinite().all()
    losses.backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0


def test_it_builds_from_its_yaml_alone(name: str, data_path: Any) -> None:
    """With nothing but the defaults and a data set."""
    config = Config(name, "toy", overrides={"data_path": str(data_path)})
    own = read_yaml(properties_dir() / f"model/{name}.yaml")
    assert own
    assert {key: config[key] for key in own} == own
    assert config.model_class is plugin_models()[name]


@by_gradient
def test_the_loss_is_finite_and_reaches_every_parameter(made: Any) -> None:
    _, train, _, model = made
    assert isinstance(train, BucketLoader)
    losses = model.calculate_loss(longest_batch(train))
    for value in losses if isinstance(losses, tuple) else (losses,):
        assert torch.isfinite(value)
        assert value > 0
    # A bias of the keys shifts all scores of a query alike: softmax takes it out.
    assert all("key.bias" in name for name in check_training(model, longest_batch(train)))


def test_its_item_table_is_a_row_an_item(made: Any) -> None:
    _, train, _, model = made
    check_item_table(model, train.dataset.item_num)
    assert isinstance(model, FittedModel) or model.item_table.requires_grad


def test_it_says_whether_scores_depend_on_a_seed(made: Any) -> None:
    _, _, test, model = made
    check_sampling(model, next(iter(test))[0], model.full_sort_predict)


def test_augmented_views_are_rows_of_items(made: Any) -> None:
    _, train, _, model = made
    check_views(model, longest_batch(train), train.dataset.item_num)


@by_gradient
def test_one_step_of_training_changes_the_scores(made: Any) -> None:
    _, train, test, model = made
    batch = next(iter(test))[0]
    model.eval()
    before = model.full_sort_predict(batch).detach()
    model.train()
    total(model.calculate_loss(longest_batch(train))).backward()
    torch.optim.Adam(model.parameters(), 0.01).step()
    model.eval()
    assert not torch.allclose(model.full_sort_predict(batch), before)


def test_predict_is_a_column_of_full_sort_predict(made: Any) -> None:
    config, _, test, model = made
    model.eval()
    batch = next(iter(test))[0]
    scores = model.full_sort_predict(batch)
    assert scores.shape == (len(batch), model.n_items)
    assert scores.std() > 0
    column = scores.gather(1, batch[config["ITEM_ID_FIELD"]].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(model.predict(batch), column)
    torch.testing.assert_close(model.full_sort_predict(batch), scores)  # no hidden randomness


def test_padding_changes_nothing(made: Any) -> None:
    _, train, _, model = made
    model.eval()  # no dropout: its draws depend on the padding
    batch = longest_batch(train)
    torch.testing.assert_close(
        model.full_sort_predict(padded(batch)), model.full_sort_predict(batch)
    )
    if isinstance(model, FittedModel):
        return
    torch.manual_seed(0)
    short = total(model.calculate_loss(batch))
    torch.manual_seed(0)
    torch.testing.assert_close(total(model.calculate_loss(padded(batch))), short)


def test_padding_is_never_recommended(
    made: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, test, model = made
    shown = []

    def collect(self: Any, scores: Any, *rest: Any) -> None:
        shown.append(scores.topk(max(self.topk)).indices)
        collect_batch(self, scores, *rest)

    collect_batch = TargetCollector.eval_batch_collect
    monkeypatch.setattr(TargetCollector, "eval_batch_collect", collect)
    score = model.full_sort_predict

    def prefer_padding(batch: Interaction) -> torch.Tensor:
        scores = score(batch).clone()
        scores[:, 0] = 1e6
        return scores

    monkeypatch.setattr(model, "full_sort_predict", prefer_padding)
    PlanTrainer(config, model, tmp_path).evaluator.evaluate(test)
    assert shown
    assert all((items > 0).all() for items in shown)
    assert all((items < model.n_items).all() for items in shown)


def test_weights_restore_the_scores(made: Any) -> None:
    config, train, test, model = made
    torch.manual_seed(1)
    other = config.model_class(config, train._dataset)
    batch = next(iter(test))[0]
    model.eval()
    other.eval()
    expected = model.full_sort_predict(batch)
    assert not torch.allclose(other.full_sort_predict(batch), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.full_sort_predict(batch), expected)


def test_a_checkpoint_alone_restores_the_scores(made: Any, data_path: Path, tmp_path: Path) -> None:
    """The model is built without data; after training, and through every phase of it."""
    config, train, test, model = made
    dataset, run_dir = train._dataset, tmp_path / "run"
    content, histories = _payload(config, dataset), dataset.histories()
    PlanTrainer(config, model, run_dir, content, histories).fit(train)
    batch = next(iter(test))[0]
    history = Interaction({key: batch[key] for key in ("item_id_list", "item_length")})
    model.eval()
    shutil.rmtree(data_path)
    restored = load(run_dir, use_gpu=False).model
    assert restored is not model
    assert restored.state_dict().keys() == model.state_dict().keys()
    for asked in (batch, history):
        assert torch.equal(restored.full_sort_predict(asked), model.full_sort_predict(asked))


@by_gradient
def test_the_seed_decides_the_loss(made: Any) -> None:
    config, train, _, _ = made

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        model = config.model_class(config, train._dataset)
        return total(model.calculate_loss(longest_batch(train))).item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
