"""The model card says what is known of a checkpoint, and nothing of the machine."""

import json
import re
from pathlib import Path

import pytest
import yaml

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.layers import PlainLoader
from recbole_simdiff.serving.card import card
from recbole_simdiff.serving.strip import strip
from tests.serving.conftest import train


def test_it_says_what_is_known(run_dir: Path) -> None:
    text = card(run_dir)
    content = checkpoint.load(run_dir / BEST)[1]
    result = json.loads((run_dir / "result.json").read_text())
    for heading in ("Data", "Protocol", "Metrics", "Settings", "Limits"):
        assert f"\n## {heading}\n" in text
    assert text.startswith("---\nlibrary_name: recbole_simdiff\n")
    assert "# SASRecCE on toy" in text
    assert "toy: 6 users, 12 items, 30 actions" in text
    assert '- split: `{"LS": "valid_and_test"}`, grouped by user' in text
    for split, name in (("validation", "valid"), ("test", "test")):
        for protocol, metrics in result[name].items():
            row = " | ".join(f"{value:.4f}" for value in metrics.values())
            assert f"| {split} | {protocol} | {row} |" in text
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    settings = yaml.load(block, PlainLoader)
    values = content["config"]["values"]
    assert settings["hidden_size"] == values["hidden_size"] == 8
    assert {key: values[key] for key in settings} == settings
    assert "seed 2020" in text
    assert "It knows 12 items" in text
    assert "It holds ids and histories of users" in text
    assert f"torch {content['versions']['torch']}" in text


def test_it_names_no_place_of_the_machine(run_dir: Path, tmp_path: Path) -> None:
    """Neither where things are, nor where a run began."""
    text = card(train(tmp_path, init_from=str(run_dir)))
    assert f"init_from: {json.dumps(run_dir.name)}" in text
    for folder in (run_dir.parent, tmp_path):
        assert str(folder) not in text


def test_without_a_result_it_has_the_validation(run_dir: Path, tmp_path: Path) -> None:
    strip(run_dir, tmp_path / "model.safetensors")
    text = card(tmp_path / "model.safetensors")
    best = checkpoint.load(run_dir / BEST)[1]["progress"]["best_result"]
    row = " | ".join(f"{value:.4f}" for value in best.values())
    assert f"| validation | history kept | {row} |" in text
    assert "| test |" not in text
    assert "It holds no users and histories" in text


def test_of_a_training_on_everything(tmp_path: Path) -> None:
    everything = {"split": {"RS": [1, 0, 0]}, "group_by": "user"}
    text = card(train(tmp_path, eval_args=everything))
    assert "nothing was held out" in text
    assert "held out, so training" not in text


def test_the_command_writes_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "card", f"--checkpoint={run_dir}"]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'card.md'}\n"
    assert (run_dir / "card.md").read_text() == card(run_dir)
    path = tmp_path / "other.md"
    assert main(["checkpoint", "card", f"--checkpoint={run_dir}", f"--output={path}"]) == 0
    assert path.read_text() == card(run_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card"], "checkpoint card needs --checkpoint"),
        (["strip", "--checkpoint=x"], "checkpoint strip needs --output"),
        (["push", "--checkpoint=x"], "checkpoint push needs --repository"),
        (["pull", "--repository=a/b", "--output=x", "--checkpoint=x"], "does not use --checkpoint"),
        (["card", "--checkpoint=x", "--repository=a/b"], "does not use --repository"),
        (["card", "--checkpoint=gone"], "no checkpoint at gone"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", *arguments]) == 2
    assert message in capsys.readouterr().err
