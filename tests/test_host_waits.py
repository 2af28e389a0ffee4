"""How often a training step waits for the device: values and shapes that the host must read there.

Counted on the stand-in device of ``tests/device.py``. What the loader does before a step is not
counted, nor are copies to the device.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.modules.catalogue import draw_candidates
from recbole_simdiff.modules.negatives import NegativeSampler
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.device import MOCK, MockTensor
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
        there = [x for x in tree_iter((args, kwargs)) if isinstance(x, MockTensor)]
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
    if packet in COPIES:  # to the host
        target = kwargs.get("device") or args[0].device
        source = args[1] if packet is aten.copy_ else args[0]
        return source.device.type == MOCK.type and torch.device(target).type == "cpu"
    return packet in WAITS


def counted(config: Any, run_dir: Path) -> Counter[str]:
    """Waits of the second training step; the first one may move tables to the device."""
    _, train, _, _, model = build_run(config)
    trainer = PlanTrainer(config, model, run_dir)
    model.train()
    model.begin_epoch(trainer.model.training_plan()[0].name, 0)
    first, second = list(train)[:2]
    trainer._step(first, trainer._updates())
    with pytest.MonkeyPatch.context() as patch, Waits() as mode:
        stock = MockTensor.tolist

        def tolist(tensor: MockTensor) -> Any:
            mode.count["tolist"] += 1
            return stock(tensor)

        patch.setattr(MockTensor, "tolist", tolist)
        trainer._step(second, trainer._updates())
    return mode.count


# Waits of a step today: fewer are welcome, more are not. Losses are read in every step ("tolist"),
# once for each update, so that a loss that is not finite stops training before the update.
MOST = {
    "CL4SRec": 2,
    "CaDiRec": 18,
    "DiffCLRec": 18,
    "DreamRec": 2,
    "DuoRec": 5,
    "ECLSR": 9,
    "ESASRec": 1,
    "MCLRec": 4,
    "SASRecCE": 1,
    "SimDiffRec": 2,
}
FITTED = {"EASE", "ItemKNN", "Pop"}  # computed, without steps


def test_every_model_has_a_limit() -> None:
    assert MOST.keys() | FITTED == plugin_models().keys()


@pytest.mark.parametrize("model", MOST)
def test_a_step_waits_no_more_often_than_it_did(
    make_config: Any,
    stand_in: Any,  # noqa: F811
    tmp_path: Path,
    model: str,
) -> None:
    stand_in()
    count = counted(make_config(model), tmp_path / "run")
    print(f"{model}: {count.total()} waits, {dict(count)}")
    assert count["tolist"] > 0  # else nothing was counted
    assert count.total() <= MOST[model]


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.cpu(), "_to_copy"),
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
