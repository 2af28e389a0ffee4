"""SASRecCE: SimDiffRec without its two losses, and on prefixes RecBole's SASRec."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec

from recbole_simdiff.models.sasrecce import SASRecCE
from recbole_simdiff.training.trainer import PlanTrainer

WITHOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


@pytest.mark.parametrize("sr_loss", ["CE", "BCE"])
@pytest.mark.parametrize("sampling", ["user_all", "prefix_last", "prefix_all"])
def test_it_is_simdiffrec_without_both_losses(
    build: Any, tmp_path: Path, sampling: str, sr_loss: str
) -> None:
    """Trained for two epochs from one seed: weights, scores and losses, bit for bit."""
    values = WITHOUT | {"train_sampling": sampling, "sr_loss": sr_loss}
    if sr_loss == "BCE":
        values |= {"MAX_ITEM_LIST_LENGTH": 3}
    runs = {}
    for name, weights in (("SASRecCE", {}), ("SimDiffRec", {"cl_weight": 0.0, "diff_weight": 0.0})):
        config, train, valid, _, model = build(name, **values, **weights)
        torch.manual_seed(1)
        trainer = PlanTrainer(config, model, tmp_path / name)
        progress = trainer.fit(train, valid)
        runs[name] = model.state_dict(), progress
    (alone, log), (whole, other) = runs.values()
    assert all(torch.equal(value, whole[key]) for key, value in alone.items())
    assert [e["loss"]["rec"] for e in log.log] == [e["loss"]["rec"] for e in other.log]
    assert [e["valid"] for e in log.log] == [e["valid"] for e in other.log]


def test_on_prefixes_it_is_recboles_sasrec(build: Any) -> None:
    """The same initial weights from the same seed, and the same loss."""
    config, train, _, _, model = build("SASRecCE", train_sampling="prefix_last", **WITHOUT)
    torch.manual_seed(0)
    theirs = SASRec(config, train._dataset)
    torch.manual_seed(0)
    ours = SASRecCE(config, train._dataset)
    assert theirs.state_dict().keys() == ours.state_dict().keys() == model.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    ours.targets_per_batch = None
    batch: Interaction = next(iter(train))
    torch.testing.assert_close(ours.calculate_loss(batch).rec, theirs.calculate_loss(batch))
    torch.testing.assert_close(ours.full_sort_predict(batch), theirs.full_sort_predict(batch))
