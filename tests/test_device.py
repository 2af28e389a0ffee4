"""Everything runs on a device that is not the CPU, and with the numbers of the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from recbole_simdiff import evaluate, load
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import Interrupted
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.pipelines.diffuasr import run_stages
from recbole_simdiff.runs.run import run_one as run
from tests.device import MOCK, MockTensor
from tests.test_resume import at, interrupt, train

HISTORIES = [["i1", "i2"], ["i9", "i8", "i7", "i6", "i11"]]


@pytest.fixture
def on_mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """on_mock(): from now on, configurations choose the device ``mock``."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    stock = Config._init_device

    def choose(config: Config) -> None:
        stock(config)
        config.final_config_dict["device"] = MOCK

    def start() -> None:
        monkeypatch.setattr(Config, "_init_device", choose)
        torch.__future__.set_swap_module_params_on_conversion(True)

    with sdpa_kernel(SDPBackend.MATH):
        yield start
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("model", [*sorted(plugin_models()), "SASRec", "BERT4Rec"])
def test_a_run_ends_as_on_the_cpu(make_config: Any, on_mock: Any, model: str) -> None:
    masks = {"MAX_ITEM_LIST_LENGTH": 8, "mask_ratio": 0.9} if model == "BERT4Rec" else {}
    cpu = run(make_config(model, **masks))
    wanted = load(cpu.run_dir).recommend(HISTORIES, k=3)
    on_mock()
    mock = run(make_config(model, **masks))
    assert (mock.valid, mock.test) == (cpu.valid, cpu.test)
    for answer, expected in zip(load(mock.run_dir).recommend(HISTORIES, k=3), wanted, strict=True):
        assert answer.items == expected.items
        assert answer.scores == pytest.approx(expected.scores, abs=1e-5)
    again = evaluate(mock.run_dir)
    assert (again.valid, again.test) == (cpu.valid, cpu.test)


SMALL_GENERATOR = {
    "hidden_size": 16,
    "n_pseudo": 2,
    "diffuasr_diffusion_steps": 25,
    "diffuasr_sample_steps": 3,
    "diffuasr_epochs": 2,
    "sunet_channel_mult": [1, 2],
    "sunet_base_channels": 8,
}


@pytest.mark.parametrize("guidance", ["classifier_free", "classifier"])
def test_pseudo_items_are_those_of_the_cpu(make_config: Any, on_mock: Any, guidance: str) -> None:
    small = {"backbone": "SASRec", "diffuasr_guidance": guidance, **SMALL_GENERATOR}
    cpu = run_stages(make_config("DiffuASR", augmentation_cache="cpu", **small))
    on_mock()
    mock = run_stages(make_config("DiffuASR", augmentation_cache="mock", **small))
    assert (mock.valid, mock.test) == (cpu.valid, cpu.test)
    assert mock.augmentation["quality"] == cpu.augmentation["quality"]


def test_a_stopped_run_goes_on_there(make_config: Any, on_mock: Any, tmp_path: Path) -> None:
    wanted = train(make_config("SimDiffRec"), tmp_path / "cpu")
    on_mock()
    config = make_config("SimDiffRec")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "mock", at(4, interrupt))
    found = train(config, tmp_path / "mock", resume=True)
    assert (found["progress"], found["test"]) == (wanted["progress"], wanted["test"])


def test_the_stand_in_tells_devices_apart() -> None:
    """Else none of the above could fail."""
    there, here = torch.arange(4.0, device=MOCK), torch.arange(4.0)
    assert isinstance(there, MockTensor)
    assert there.device == MOCK
    assert there.cpu().tolist() == here.tolist()
    for mixed in (
        lambda: there + here,
        lambda: here + there[0],
        lambda: here[there.long()],
        lambda: F.embedding(here.long(), there.unsqueeze(1)),
        lambda: there.index_copy(0, torch.tensor([1]), there[:1]),
        lambda: torch.where(here > 1, there, 0.0),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    assert (there[torch.tensor([1, 2])] + torch.tensor(1.0)).tolist() == [2.0, 3.0]
