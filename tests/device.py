"""A stand-in for a GPU: tensors that live on device ``mock`` and are computed on the CPU.

An operation whose tensors are not all on one device fails as it does with CUDA, and a value that is
read without a copy to the CPU, too. The numbers are those of the CPU to the bit, random ones
included, so a run on ``mock`` must end with the result of a run on the CPU, where both make
attention of plain operations (``SDPBackend.MATH``). What it cannot show is what the kernels of a
real GPU do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten


class _Module(_DummyBackendModule):
    """torch.mock: one device, which takes its random numbers from the CPU."""

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("mock", backend_module=_Module())
MOCK = torch.device("mock:0")
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class MockTensor(Tensor):
    """A tensor of the device ``mock``; ``values`` holds its numbers, on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "MockTensor":
        made: MockTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=MOCK,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"MockTensor({self.values})"

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert mock:0 device type tensor to numpy; copy it to the CPU")


def _check_devices(packet: Any, tensors: list[Tensor]) -> None:
    """As CUDA: numbers may be on the CPU, and so may the positions of an indexed tensor."""
    if packet in COPIES:
        return
    must = tensors[:1] if packet in INDEXING else [x for x in tensors if x.dim()]
    if not all(isinstance(x, MockTensor) for x in must):
        found = ", ".join(f"{x.device} {list(x.shape)}" for x in tensors)
        raise RuntimeError(f"{packet}: expected all tensors on the same device, but got {found}")


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    _check_devices(func.overloadpacket, tensors)
    device = kwargs.get("device") or (args[0].device if func is aten.copy_.default else MOCK)
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}

    def values(x: Any) -> Any:
        return x.values if isinstance(x, MockTensor) else x

    out = func(*tree_map(values, args), **tree_map(values, kwargs))
    if torch.device(device).type != MOCK.type:
        return out
    out = tree_map(lambda x: MockTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _copy_from(source: Tensor, target: MockTensor, non_blocking: bool = False) -> Tensor:
    target.values.copy_(source)
    return target


def _make(function: Any) -> Any:
    """``function`` on the CPU, for new tensors of the device ``mock``."""

    def make(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return MockTensor(function(*args, dtype=dtype))

    return make


_library = torch.library.Library("aten", "IMPL")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
for _name, _function in {
    "empty.memory_format": torch.empty,
    "empty_strided": torch.empty_strided,
    "arange": torch.arange,
    "arange.start": torch.arange,
    "arange.start_step": torch.arange,
    "eye": torch.eye,
}.items():
    _library.impl(_name, _make(_function), "PrivateUse1")
# torch.autocast leaves the precision as it is.
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
