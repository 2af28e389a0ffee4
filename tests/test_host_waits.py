"""No training step waits for the device: for values and shapes that the host must read there.

Counted on the stand-in device of ``tests/device.py``, copies that wait included. What the loader
does before a step is not counted; it works on the host.
"""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.errors import TrainingDiverged
from recbole_simdiff.models.diffuasr.training import GeneratorTraining
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.models.simdiffrec import SimDiffRec
from recbole_simdiff.modules.catalogue import draw_candidates
from recbole_simdiff.modules.negatives import NegativeSampler
from recbole_simdiff.pipelines.diffuasr import run_stages
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.training.loss_values import READ_EVERY, LossValues
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter
from tests.data.toy import LONG, augmented
from tests.device import MOCK, MockTensor
from tests.test_device import SMALL_GENERATOR
from tests.test_device import on_mock as stand_in  # noqa: F401

aten = torch.ops.aten
# Operations whose result, or its shape, the host must have before it can go on.
WAITS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
}
BY_POSITION = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class Waits(TorchDispatchMode):
    """Counts the waits within the block, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = [x.device for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        devices.append(torch.device(kwargs.get("device") or "cpu"))
        there = any(device.type == MOCK.type for device in devices)
        if there and waits(func.overloadpacket, args, kwargs):
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs)


def waits(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation on tensors of the device makes the host wait."""
    if packet in BY_POSITION:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return bool(masks)
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet in COPIES:
        target, source = (args[:2]) if packet is aten.copy_ else (kwargs, args[0])
        to = target.device if packet is aten.copy_ else kwargs.get("device", source.device)
        to_host = source.device.type == MOCK.type and torch.device(to).type == "cpu"
        to_device = source.device.type == "cpu" and torch.device(to).type == MOCK.type
        # One that does not wait reads the host's memory while the host goes on.
        asynchronous = kwargs.get("non_blocking", packet is aten.copy_ and args[2:] == (True,))
        return to_host or (to_device and not asynchronous)
    return packet in WAITS


def counted(config: Any, run_dir: Path, pseudo: Tensor | None = None) -> Counter[str]:
    """Waits of the second training step; the first one may move tables to the device."""
    _, train, _, _, model = build_run(config, pseudo)
    trainer = PlanTrainer(config, model, run_dir)
    model.train()
    model.begin_epoch(trainer.model.training_plan()[0].name, 1)
    updates = trainer._updates()
    first, second = list(train)[:2]
    trainer._step(first, updates)
    with pytest.MonkeyPatch.context() as patch, Waits() as mode:
        stock = MockTensor.tolist

        def tolist(tensor: MockTensor) -> Any:
            mode.count["tolist"] += 1
            return stock(tensor)

        patch.setattr(MockTensor, "tolist", tolist)
        trainer._step(second, updates)
        found = mode.count.copy()
        trainer.losses.read_into(trainer.progress)
        assert mode.count - found == Counter(tolist=1)  # else nothing was counted
    return found


MODELS = plugin_models().keys() - {"EASE", "ItemKNN", "Pop"}  # which are computed, without steps

# What else a step can do: settings that take another way through it.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("SASRecCE", {"train_sampling": "prefix_last"}),
    ("SASRecCE", {"sr_loss": "BCE"}),
    ("SASRecCE", {"sr_loss": "BCE", "train_sampling": "prefix_last"}),
    ("SASRecCE", {"sr_loss": "gBCE", "negatives_per": "token"}),
    ("SASRecCE", {"sr_loss": "sampled_softmax", "negative_distribution": "log_uniform"}),
    ("SASRecCE", {"repeat_bias": "learned"}),
    ("SASRecCE", {"repeat_bias": "learned", "train_sampling": "prefix_last"}),
    ("SASRecCE", {"clip_grad_norm": {"max_norm": 1.0}}),
    ("SASRecCE", {"enable_amp": True}),
    ("SimDiffRec", {"contrast_at": "every", "train_sampling": "user_all", "contrast_states": 4}),
    ("SimDiffRec", {"pos_sample": 3, "k_sample": 5, "pos_exclude_original": True}),
    ("SimDiffRec", {"cl_balance": 0.5, "cl_dropout": 0.1, "noise_detach": False}),
    ("SimDiffRec", {"noise_refresh": "epoch"}),
    ("SimDiffRec", {"confidence_t": "train_t", "cl_negatives": "pos_only", "rounding": "scaled"}),
    ("SimDiffRec", {"preset": "wo_c_aug"}),
    ("SimDiffRec", {"preset": "wo_k_noise"}),
    ("CaDiRec", {"preset": "official"}),
    ("CaDiRec", {"nll_reduction": "sequence", "reverse_steps": 0, "denoiser_pos": "relative"}),
    ("CaDiRec", {"preset": "separate_items", "x0_noise": True}),
    ("DreamRec", {"preset": "ce"}),
    ("DreamRec", {"train_sampling": "user_all", "denoiser": "mlp2"}),
    ("CL4SRec", {"fn_mask": "user", "operators": "independent"}),
    ("DuoRec", {"contrast": "us"}),
    ("DuoRec", {"contrast": "un", "train_sampling": "user_all"}),
    ("MCLRec", {"preset": "official"}),
    ("ECLSR", {"preset": "official"}),
    ("ECLSR", {"masking": "count", "condition": "position"}),
]


@pytest.mark.parametrize(("model", "settings"), [*((m, {}) for m in sorted(MODELS)), *SETTINGS])
def test_a_step_waits_for_nothing(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
    model: str,
    settings: dict[str, Any],
) -> None:
    stand_in()
    assert counted(make_config(model, **settings), tmp_path / "run") == Counter()


@pytest.mark.parametrize("model", ["SASRecCE", "SimDiffRec", "DreamRec"])
def test_pseudo_items_in_front_bring_no_wait(
    data_path: Path,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
    model: str,
) -> None:
    stand_in()
    write_inter(data_path, "long", LONG)
    settings = {"contrast_at": "every"} if model == "SimDiffRec" else {}
    config = augmented(data_path, model, train_sampling="user_all", train_batch_size=2, **settings)
    pseudo = torch.randint(1, 5, (len(LONG) + 1, 3))
    assert counted(config, tmp_path / "run", pseudo) == Counter()


def test_the_released_simdiffrec_waits_for_the_lengths_of_its_views(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """It overwrites padding, too, so that a view is as long as what was drawn makes it."""
    stand_in()
    count = counted(make_config("SimDiffRec", preset="official"), tmp_path / "run")
    assert count == Counter(_to_copy=1)


@pytest.mark.parametrize(("decay", "waits"), [(0.0, 0), (0.99, 1)])
def test_a_step_of_the_generator_waits_for_its_average_only(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    decay: float,
    waits: int,
) -> None:
    """torch's AveragedModel copies its count of updates to the device."""
    stand_in()
    found, stock = [], PlanTrainer._step

    def step(trainer: PlanTrainer, *given: Any) -> None:
        with Waits() as mode:
            stock(trainer, *given)
        if isinstance(trainer.model, GeneratorTraining):
            found.append(mode.count.total())

    monkeypatch.setattr(PlanTrainer, "_step", step)
    settings = {"backbone": "SASRec", "augmentation_cache": "mock", "diffuasr_ema_decay": decay}
    run_stages(make_config("DiffuASR", **SMALL_GENERATOR, **settings))
    assert len(found) > 1
    assert found[1:] == [waits] * (len(found) - 1)


def test_losses_are_read_once_in_a_while(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the sums of a training on the CPU, which reads every value at once."""

    def trained(name: str) -> PlanTrainer:
        config = make_config("MCLRec", train_batch_size=1)
        _, train, _, _, model = build_run(config)
        trainer = PlanTrainer(config, model, tmp_path / name)
        model.begin_epoch(model.training_plan()[0].name, 0)
        trainer._train_epoch(train, 0)
        return trainer

    wanted = trained("cpu").progress
    assert wanted.step > READ_EVERY
    stand_in()
    reads = []
    stock = MockTensor.tolist
    monkeypatch.setattr(
        MockTensor, "tolist", lambda tensor: reads.append(tensor.shape) or stock(tensor)
    )
    found = trained("mock").progress
    assert len(reads) == -(-wanted.step // READ_EVERY)
    assert (found.step, found.loss_sums) == (wanted.step, wanted.loss_sums)


@pytest.mark.parametrize("bad", [3, 12])
def test_nothing_is_saved_with_a_loss_that_is_not_finite(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
    bad: int,
) -> None:
    stand_in()
    assert 3 < READ_EVERY < 12  # by the end of the epoch, and within it
    config = make_config("SASRecCE", train_batch_size=1, train_sampling="prefix_last")
    _, train, valid, _, model = build_run(config)
    trainer = PlanTrainer(config, model, tmp_path / "run")
    assert bad < len(train)
    stock, calls = model.calculate_loss, []

    def loss(batch: Any) -> Any:
        calls.append(batch)
        found = stock(batch)
        return found._replace(rec=found.rec * math.nan) if len(calls) == bad + 1 else found

    model.calculate_loss = loss
    with pytest.raises(TrainingDiverged, match=f"'rec' is nan at epoch 0, step {bad}; training s"):
        trainer.fit(train, valid)
    assert len(calls) - bad <= READ_EVERY
    # Also where a signal asks for a state.
    trainer.losses.add(0, [LossValues(("rec",), (), torch.full((1,), math.nan, device=MOCK))])
    with pytest.raises(TrainingDiverged):
        trainer.save_state(LAST)
    tensors, content = checkpoint.load(tmp_path / "run" / LAST)
    assert content["progress"]["step"] == 0
    weights = [value for name, value in tensors.items() if name.startswith("model.")]
    assert len(weights) > 0
    assert all(value.isfinite().all() for value in weights)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.arange(3).to(MOCK), "_to_copy"),
        (lambda x: torch.arange(3).to(MOCK, non_blocking=True), ""),
        (lambda x: x.copy_(torch.arange(4.0)), "copy_"),
        (lambda x: x.copy_(torch.arange(4.0), non_blocking=True), ""),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x[x.long()], ""),
        (lambda x: torch.where(x > 1, x, 0.0), ""),
        (lambda x: x.sort(), ""),
        (lambda x: torch.nonzero_static(x, size=3), ""),
    ],
)
def test_a_wait_would_be_seen(wait: Any, name: str) -> None:
    tensor = torch.arange(4.0, device=MOCK)
    with Waits() as mode:
        wait(tensor)
    assert set(mode.count) == ({name} if name else set())


def test_an_approximate_catalogue_is_drawn_without_a_wait() -> None:
    """On the device, and with the items that are drawn on the CPU."""
    sampler, given = NegativeSampler("log_uniform", torch.arange(60), 60), torch.tensor([7, 3, 7])
    torch.manual_seed(0)
    wanted = draw_candidates(sampler, given, 20)
    there = given.to(MOCK)
    draw_candidates(sampler, there, 20)  # moves the sampler's tables
    torch.manual_seed(0)
    with Waits() as mode:
        found = draw_candidates(sampler, there, 20)
        found.place(there)
    assert not mode.count
    assert isinstance(found.items, MockTensor)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.cpu(), other)


def test_positive_items_are_those_that_multinomial_draws() -> None:
    """SimDiffRec draws as it does, without its checks of the probabilities, which wait."""
    logits, ranked = torch.randn(50, 4), torch.arange(200).view(50, 4)
    model = SimpleNamespace(pos_sample=4, pos_exclude_original=False)
    torch.manual_seed(0)
    found = SimDiffRec._draw(model, logits, ranked, ranked[:, :1])
    torch.manual_seed(0)
    assert torch.equal(found, ranked.gather(1, logits.softmax(1).multinomial(1)).squeeze(1))
