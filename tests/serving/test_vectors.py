"""Vectors whose products are the model's scores, and their files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_simdiff import UserError, load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.recommender import Recommender, UnknownItems
from recbole_simdiff.serving.vectors import BY_PRODUCT, Vectors
from tests.conftest import SEQUENCES
from tests.serving.conftest import train

HISTORIES = {"u1": ["i1", "i2"], "u2": ["i9"], "u3": SEQUENCES["a"]}


def product(recommender: Recommender) -> list[dict[str, float]]:
    """Scores of all items for each history, by vectors."""
    items, users = recommender.item_vectors(), recommender.user_vectors(HISTORIES)
    assert users.ids == list(HISTORIES)
    return [dict(zip(items.ids, row, strict=True)) for row in users.values @ items.values.T]


def check_product(recommender: Recommender) -> None:
    """Products of vectors are the scores that recommend gives."""
    answers = recommender.recommend(list(HISTORIES.values()), k=12, exclude_seen=False)
    for found, answer in zip(product(recommender), answers, strict=True):
        wanted = dict(zip(answer.items, answer.scores, strict=True))
        assert found == pytest.approx(wanted, abs=1e-5)


def test_products_are_scores(recommender: Recommender) -> None:
    assert recommender.item_vectors().ids == [f"i{n}" for n in range(1, 13)]
    check_product(recommender)


@pytest.mark.parametrize("model", ["SimDiffRec", "CL4SRec", *BY_PRODUCT])
def test_products_are_scores_of_other_models(tmp_path: Path, model: str) -> None:
    check_product(load(train(tmp_path, model), use_gpu=False))


@pytest.mark.parametrize("score", ["ip", "cos", "l2"])
def test_products_are_scores_of_dreamrec(tmp_path: Path, score: str) -> None:
    """The nearest item has the largest product once its norm is a column of its own."""
    check_product(load(train(tmp_path, "DreamRec", score=score), use_gpu=False))


def test_a_model_without_vectors_of_users_says_so(tmp_path: Path) -> None:
    recommender = load(train(tmp_path, "NextItNet"), use_gpu=False)
    assert len(recommender.item_vectors().ids) == 12
    with pytest.raises(UserError, match="model=NextItNet has no vectors of users"):
        recommender.user_vectors(HISTORIES)


def test_a_model_that_scores_otherwise_is_found_out(recommender: Recommender) -> None:
    stock = recommender.model.full_sort_predict
    recommender.model.full_sort_predict = lambda batch: stock(batch) + 1
    with pytest.raises(UserError, match="does not score by the product"):
        recommender.user_vectors(HISTORIES)


def test_a_history_without_a_known_item_has_no_vector(recommender: Recommender) -> None:
    with pytest.warns(UnknownItems, match="2 histories have no known item; left out"):
        found = recommender.user_vectors({"a": ["zz"], "b": ["i1"], "c": []})
    assert found.ids == ["b"]
    np.testing.assert_allclose(found.values, recommender.user_vectors({"b": ["i1"]}).values)
    assert recommender.user_vectors({}).values.shape == (0, 8)


def read(path: Path) -> Vectors:
    """The file of vectors."""
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["id", *map(str, range(len(header) - 1))]
        values = np.array([[float(cell) for cell in row[1:]] for row in rows], dtype=np.float32)
        return Vectors([row[0] for row in rows], values)
    if path.suffix == ".npz":
        content = np.load(path)
        return Vectors(content["ids"].tolist(), content["vectors"])
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = parquet.read_table(path).to_pydict()
    return Vectors(columns["id"], np.array(columns["vector"], dtype=np.float32))


@pytest.mark.parametrize("format", ["csv", "npz", "parquet"])
def test_files_hold_what_python_gives(
    run_dir: Path, recommender: Recommender, tmp_path: Path, format: str, capsys: Any
) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    rows = [json.dumps({"user": user, "items": items}) for user, items in HISTORIES.items()]
    (tmp_path / "histories").write_text("\n".join([*rows, '{"user": "u4", "items": ["zz"]}']))
    given = ["export", f"--checkpoint={run_dir}", "--use_gpu=false", f"--format={format}"]
    given += [f"--output={tmp_path / 'out'}", f"--histories={tmp_path / 'histories'}"]
    assert main(given) == 0
    printed = capsys.readouterr()
    places = [tmp_path / "out" / f"{name}.{format}" for name in ("users", "items")]
    assert printed.out.split() == list(map(str, places))
    assert "1 histories without a known item left out" in printed.err
    wanted = (recommender.user_vectors(HISTORIES), recommender.item_vectors())
    for place, vectors in zip(places, wanted, strict=True):
        found = read(place)
        assert found.ids == vectors.ids
        np.testing.assert_allclose(found.values, vectors.values, rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("zz\n", "no history has an item of the training data"),
        ('{"user": "u", "items": ["i1"]}\n' * 2, "two histories are called 'u'"),
        ("{\n", "line 1: not JSON"),
    ],
)
def test_histories_that_cannot_be_used(
    run_dir: Path, tmp_path: Path, capsys: Any, lines: str, message: str
) -> None:
    (tmp_path / "histories").write_text(lines)
    given = ["export", f"--checkpoint={run_dir}", f"--output={tmp_path / 'out'}"]
    assert main([*given, f"--histories={tmp_path / 'histories'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
