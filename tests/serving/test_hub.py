"""``push`` and ``pull`` with a folder in place of the Hub: calls are checked, not the server."""

import builtins
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from recbole_simdiff import checkpoint, load
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.cli.main import main

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in that accepts the calls which the library accepts, and keeps files in ``there``."""
    there = tmp_path / "hub"
    api = create_autospec(huggingface_hub.HfApi, instance=True)

    def create_repo(repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert private
        (there / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        *, repo_id: str, folder_path: Path, allow_patterns: list[str], **_: Any
    ) -> Any:
        for path in folder_path.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, there / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def hf_hub_download(repo_id: str, filename: str, *, local_dir: str) -> str:
        if not (there / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}\nsecond line")
        return shutil.copy(there / repo_id / filename, local_dir)

    api.create_repo.side_effect = create_repo
    api.upload_folder.side_effect = upload_folder
    api.hf_hub_download.side_effect = hf_hub_download
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return SimpleNamespace(api=api, there=there)


PUSH = ["checkpoint", "push", "--repository=me/model"]
PULL = ["checkpoint", "pull", "--repository=me/model", "--output=pulled"]


def test_there_and_back(hub: Any, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PUSH, f"--checkpoint={run_dir}"]) == 0
    assert capsys.readouterr().out == "hub/me/model/commit/1\n"
    assert main(PULL) == 0
    assert capsys.readouterr().out == f"pulled/{BEST}\n"
    assert {path.name for path in Path("pulled").iterdir()} == {BEST, "README.md"}
    histories = [["i1", "i2"], ["i9"]]
    before, after = (load(place, use_gpu=False) for place in (run_dir, "pulled"))
    assert after.recommend(histories, k=5) == before.recommend(histories, k=5)


def test_no_user_is_uploaded(hub: Any, run_dir: Path) -> None:
    assert main([*PUSH, f"--checkpoint={run_dir}"]) == 0
    assert {path.name for path in (hub.there / "me/model").iterdir()} == {BEST, "README.md"}
    tensors, content = checkpoint.load(hub.there / "me/model" / BEST)
    assert content["users"] == ["[PAD]"]
    assert not {"data.history_items", "data.history_ends"} & tensors.keys()
    text = (hub.there / "me/model/README.md").read_text()
    assert "It holds no users and histories" in text
    assert "| test |" in text  # which the uploaded file alone does not know
    assert str(run_dir.parent) not in text


def test_what_is_no_checkpoint_is_not_kept(hub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hub.there / "me/model"
    folder.mkdir(parents=True)
    for name in (BEST, "README.md"):
        (folder / name).write_text("pickle")
    assert main(PULL) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err
    assert not Path("pulled").exists()


def test_mistakes_are_named(
    hub: Any, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(PULL) == 2
    error = capsys.readouterr().err
    assert "--repository=me/model: LocalEntryNotFoundError: no me/model" in error
    assert "second line" not in error
    assert main([*PULL[:-1], f"--output={run_dir}"]) == 2
    assert f"holds a {BEST} already" in capsys.readouterr().err
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(PULL) == 2
    assert "pip install 'recbole_simdiff[hub]'" in capsys.readouterr().err
