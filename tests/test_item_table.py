"""``item_table``: what is taken from another run, what is refused, and what needs no other run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff import checkpoint, evaluate, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.diffusion.whitening import whiten
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.run import run_one as run
from tests.conftest import SEQUENCES, write_inter


def weights(run_dir: str | Path, name: str = BEST) -> dict[str, torch.Tensor]:
    return checkpoint.subset(checkpoint.load(Path(run_dir) / name)[0], "model")


@pytest.fixture
def encoder(make_config: Any) -> Path:
    """Run folder of an encoder on ``toy``."""
    return Path(run(make_config("SASRecCE")).run_dir)


@pytest.mark.parametrize("model", ["SASRecCE", "BERT4Rec", "GRU4Rec", "SimDiffRec", "DreamRec"])
def test_the_table_is_whitened_and_stays(make_config: Any, model: str) -> None:
    """Of this package's models and RecBole's, without rows of other tokens, in every epoch."""
    needs = {"GRU4Rec": {"embedding_size": 8}, "BERT4Rec": {"mask_ratio": 0.5, "epochs": 1}}
    source = run(make_config(model, **needs.get(model, {}))).run_dir
    result = run(make_config("DreamRec", item_table=source))
    n_items = 13
    expected = whiten(weights(source)["item_embedding.weight"][:n_items])
    for name in (BEST, LAST):
        assert torch.equal(weights(result.run_dir, name)["item_embedding.weight"], expected)


def test_what_was_taken_is_logged(make_config: Any, encoder: Path) -> None:
    result = run(make_config("DreamRec", item_table=str(encoder / BEST)))
    (log,) = Path(result.run_dir).glob("*.log")
    assert f"the 12 item embeddings of SASRecCE in {encoder / BEST}, 8 dim" in log.read_text()


def test_the_source_is_read_once_only(make_config: Any, encoder: Path) -> None:
    """Evaluation, recommendation and a resumed training go on where it is gone."""
    config = make_config("DreamRec", item_table=str(encoder))
    whole = run(config)
    begun = run(make_config("DreamRec", item_table=str(encoder), epochs=1))
    shutil.rmtree(encoder)
    found = evaluate(whole.run_dir)
    assert (found.valid, found.test) == (whole.valid, whole.test)
    assert load(whole.run_dir).recommend([["i1", "i2"]], k=3)
    last = Path(begun.run_dir) / LAST
    resumed = run(resumed_config(last, {"epochs": 2}), resume=last)
    assert resumed.test == whole.test
    for name, value in weights(whole.run_dir).items():
        assert torch.equal(weights(resumed.run_dir)[name], value), name


def test_other_data_are_refused(make_config: Any, encoder: Path, tmp_path: Path) -> None:
    """Other items, other users, or other events of the same users and items."""
    changed = {
        "items": SEQUENCES | {"f": ["i10", "i13"]},
        "users": {**SEQUENCES, "g": ["i1", "i2"]},
        "events": SEQUENCES | {"f": ["i1", "i10"]},
    }
    for name, sequences in changed.items():
        write_inter(tmp_path / "dataset", name, sequences)
        with pytest.raises(UserError, match=rf"the data set '{name}' .* is not the one .*{BEST}"):
            run(make_config("DreamRec", name, item_table=str(encoder)))
    assert not list((tmp_path / "saved").glob("DreamRec*"))  # refused before a folder is made


def test_another_split_is_refused(make_config: Any, encoder: Path) -> None:
    """The encoder may have been trained on what is held out here."""
    with pytest.raises(UserError, match="so it may have seen what is held out"):
        run(
            make_config(
                "DreamRec", item_table=str(encoder), eval_args={"split": {"LS": "valid_only"}}
            )
        )


def test_unusable_runs_are_refused(make_config: Any, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*gone"):
        run(make_config("DreamRec", item_table=str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"hidden_size=4 must be 8, the dimensions of the emb"):
        run(make_config("DreamRec", item_table=str(encoder), hidden_size=4))
    tensors, content = checkpoint.load(encoder / BEST)
    table = tensors["model.item_embedding.weight"]
    broken = tmp_path / "broken.safetensors"
    for bad, message in (
        (table[:5], r"model=SASRecCE has no embedding for each of its 12 items"),
        (table * float("nan"), r"model=SASRecCE has no embedding for each"),
        (table * 0 + 1, r"cannot be whitened: the items span 0 of 8 dimensions"),
    ):
        checkpoint.save(broken, tensors | {"model.item_embedding.weight": bad}, content)
        with pytest.raises(UserError, match=message):
            run(make_config("DreamRec", item_table=str(broken)))
    tensors.pop("model.item_embedding.weight")
    checkpoint.save(broken, tensors, content)
    with pytest.raises(UserError, match="has no embedding for each of its 12 items"):
        run(make_config("DreamRec", item_table=str(broken)))
    with pytest.raises(UserError, match="item_table=3 must be a folder"):
        make_config("DreamRec", item_table=3)


def test_the_content_of_the_table_names_the_result(make_config: Any, encoder: Path) -> None:
    """Another training in the same folder is another result; another epoch's weights, too."""
    config = make_config("DreamRec", item_table=str(encoder))
    before = fingerprint(config, "data")
    assert fingerprint(config, "data") == before
    assert fingerprint(make_config("DreamRec"), "data") != before
    tensors, content = checkpoint.load(encoder / BEST)
    tensors["model.item_embedding.weight"] += 1
    checkpoint.save(encoder / BEST, tensors, content)
    assert fingerprint(config, "data") != before


def test_a_stored_name_of_a_run_is_not_opened(make_config: Any, encoder: Path) -> None:
    """A checkpoint may come from anywhere; what it names is never read."""
    result = run(make_config("DreamRec", item_table=str(encoder)))
    for path in encoder.iterdir():
        if path.is_file():
            path.write_bytes(b"no checkpoint")
    last = Path(result.run_dir) / LAST
    config = resumed_config(last, {"epochs": 3})
    assert config["item_table"] == str(encoder)
    fingerprint(config, "data")
    log = json.loads((Path(run(config, resume=last).run_dir) / "result.json").read_text())["log"]
    assert len(log) == 3
