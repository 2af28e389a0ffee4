"""Every model learns what can be learnt, and nothing where there is nothing to learn.

100 users with 9 items each: a walk around a circle of 15 items, where the newest item decides the
next one, or random draws. A split or a label that is off by one shows on the first, a target that
leaks into the input on the second.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter

N_CHAIN = 15
SMALL = {
    "MAX_ITEM_LIST_LENGTH": 8,
    "hidden_size": 16,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "train_batch_size": 25,
    "learning_rate": 0.01,
    "epochs": 15,
}
# A row a prefix: seven times as many rows an epoch.
PREFIXES: dict[str, Any] = {"train_batch_size": 50, "epochs": 6}
NEEDS: dict[str, dict[str, Any]] = {
    "CaDiRec": {"denoiser_dropout": 0.0},
    "DiffCLRec": {"denoiser_dropout": 0.0},
    # The newest item alone decides, and a crop removes it: at weight 0.1 that is most of the loss.
    "CL4SRec": PREFIXES | {"cl_weight": 0.01},
    "DreamRec": {"preset": "detached", "epochs": 60, "train_batch_size": 50},
    "DuoRec": PREFIXES,
    "ECLSR": PREFIXES,
    "MCLRec": PREFIXES | {"cl_weight": 0.01, "meta_weight": 0.01},
}
# Pop knows no sequence, and the similarities of the two others no order: nothing to learn here.
UNORDERED = {"EASE", "ItemKNN", "Pop"}
CASES = [(name, NEEDS.get(name, {})) for name in sorted(plugin_models().keys() - UNORDERED)]
CASES += [
    ("SimDiffRec", {"cl_weight": 0.0, "diff_weight": 0.0}),
    ("SimDiffRec", {"contrast_at": "every", "cl_similarity": "dot", "tau": 1.0}),
    ("CaDiRec", NEEDS["CaDiRec"] | {"sr_loss": "CE"}),
    ("CL4SRec", {"cl_weight": 0.01, "train_sampling": "user_all", "epochs": 30}),
]
every_case = pytest.mark.parametrize(
    ("model", "values"), CASES, ids=[f"{n}-{model}" for n, (model, _) in enumerate(CASES)]
)


def hit_rate(
    build: Any, folder: Path, name: str, values: dict[str, Any], predictable: bool
) -> float:
    """Share of test targets that come first among the items outside the history.

    Where negatives are drawn outside the history, nothing pushes that down the ranking.
    """
    draw = random.Random(0)
    users = {}
    for user in range(100):
        start = draw.randrange(N_CHAIN)
        walk = [start + i if predictable else draw.randrange(N_CHAIN) for i in range(9)]
        users[f"u{user}"] = [f"i{item % N_CHAIN}" for item in walk]
    write_inter(folder, "chain", users)
    values = SMALL | values
    config, train, _, test, model = build(name, "chain", data_path=str(folder), **values)
    PlanTrainer(config, model, folder / "run").fit(train)
    model.eval()
    hits = []
    for batch, *_ in test:
        scores = model.full_sort_predict(batch)
        scores = scores.scatter(1, batch["item_id_list"], -torch.inf)
        scores[:, 0] = -torch.inf
        scores.scatter_(1, batch["item_id"].unsqueeze(1), model.predict(batch).unsqueeze(1))
        hits.append(scores.argmax(1) == batch["item_id"])
    return torch.cat(hits).float().mean().item()


@every_case
def test_a_predictable_chain_is_learnt(
    build: Any, tmp_path: Path, model: str, values: dict[str, Any]
) -> None:
    assert hit_rate(build, tmp_path, model, values, predictable=True) > 0.9


@every_case
def test_a_random_chain_is_not_learnt(
    build: Any, tmp_path: Path, model: str, values: dict[str, Any]
) -> None:
    """At most 1 in 7 by chance."""
    assert hit_rate(build, tmp_path, model, values, predictable=False) < 0.3
