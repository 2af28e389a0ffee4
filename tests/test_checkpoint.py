"""Checkpoints: what was written comes back, a crash loses nothing, and no file is trusted."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from recbole_simdiff import checkpoint, files
from recbole_simdiff.errors import UserError

TENSORS = {
    "model.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "model.double": torch.tensor([1 / 3], dtype=torch.float64),
    "rng.torch": torch.tensor([0, 255, 7], dtype=torch.uint8),
    "optimizer.0.step": torch.tensor(3.0),
    "data.mask": torch.tensor([True, False]),
    "data.ids": torch.tensor([2**40], dtype=torch.int64),
    "data.empty": torch.zeros(0, 4, dtype=torch.int32),
}
CONTENT: dict[str, Any] = {"text": "Amélie", "best": 0.1, "none": None, "list": [1, {"a": True}]}


def names_in(folder: Path) -> list[str]:
    """Names of all files, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint in a folder of its own."""
    place = tmp_path / "run" / "last.safetensors"
    checkpoint.save(place, TENSORS, CONTENT)
    return place


def test_round_trip_keeps_values_dtypes_shapes_and_json(path: Path) -> None:
    tensors, content = checkpoint.load(path)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor), name
    assert content == CONTENT
    assert names_in(path.parent) == ["last.safetensors"]


def test_floats_that_no_decimal_can_shorten_survive(tmp_path: Path) -> None:
    """Best scores are compared after a restart, so they must come back bit for bit."""
    value = 0.1 + 0.2
    checkpoint.save(tmp_path / "c.safetensors", {}, {"score": value})
    assert checkpoint.load(tmp_path / "c.safetensors")[1]["score"] == value


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    """Tied weights and transposed views are refused by safetensors itself."""
    weight = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path / "c.safetensors", {"a": weight, "b": weight, "t": weight.t()}, {})
    tensors, _ = checkpoint.load(tmp_path / "c.safetensors")
    assert torch.equal(tensors["a"], tensors["b"])
    assert torch.equal(tensors["t"], weight.t())


def test_the_copy_is_taken_when_saving(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    checkpoint.save(tmp_path / "c.safetensors", {"w": weight}, {})
    weight.data.zero_()
    assert checkpoint.load(tmp_path / "c.safetensors")[0]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_before_the_rename_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def crash(*_: Any) -> None:
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(type(error)):
        checkpoint.save(path, {"model.weight": torch.zeros(2, 3)}, {})
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["last.safetensors"]


def test_a_crash_while_writing_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def half(name: str) -> None:
        Path(name).write_bytes(before[: len(before) // 2])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, half)
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["last.safetensors"]


def test_the_target_changes_only_at_the_rename(path: Path) -> None:
    """The temporary file lies below the same folder, or the rename would be a copy."""
    before, seen = path.read_bytes(), []

    def write(name: str) -> None:
        seen.append((Path(name).parent.parent, path.read_bytes()))
        Path(name).write_text("new")

    files.write_atomically(path, write)
    assert seen == [(path.parent, before)]
    assert path.read_text() == "new"


def leave(path: Path) -> Path:
    """What a writer leaves that is killed."""

    def killed(name: str) -> None:
        Path(name).write_text("half a file")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(path, killed)
    (left,) = (p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}."))
    return left


def test_what_a_killed_writer_left_goes_with_the_next_write(path: Path) -> None:
    left, others = leave(path), leave(path.parent / "other")
    (left / ".tmpAbCd12").touch()  # safetensors' own
    mine = path.parent / f".{path.name}.mine.tmp"  # not made here
    mine.mkdir()
    checkpoint.save(path, TENSORS, CONTENT)
    assert not left.exists()
    assert others.exists()
    assert mine.exists()


def test_a_file_that_is_being_written_is_not_swept(path: Path) -> None:
    left = leave(path.parent / "other")

    def write(name: str) -> None:
        checkpoint.save(Path(name), {}, {})
        files.sweep(path.parent)
        assert not left.exists()
        assert Path(name).exists()

    files.write_atomically(path, write)
    assert names_in(path.parent) == ["last.safetensors"]


def test_a_full_disk_is_told_with_the_file(path: Path) -> None:
    """Also where safetensors writes, which only mentions it."""

    def write(text: str) -> Any:
        def fail(_: str) -> None:
            raise SafetensorError(text) if text else OSError(errno.ENOSPC, "full", "elsewhere")

        return fail

    for text in ("", "I/O error: No space left on device (os error 28)"):
        with pytest.raises(OSError, match="No space left on device") as found:
            files.write_atomically(path, write(text))
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(SafetensorError):
        files.write_atomically(path, write("no such thing"))
    assert names_in(path.parent) == ["last.safetensors"]


def test_a_lock_keeps_others_out_and_its_file_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "a.log"
    lock.write_text("line\n")
    with (
        files.locked(lock, wait=False),
        pytest.raises(BlockingIOError),
        files.locked(lock, wait=False),
    ):
        pass
    with files.locked(lock, wait=False):
        pass
    assert lock.read_text() == "line\n"


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    """Opened to be written, it emptied the file that it pointed to."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".run.lock").symlink_to(precious)
    with (
        pytest.raises(UserError, match=r"\.run\.lock is a symbolic link"),
        files.exclusive(tmp_path / "run"),
    ):
        pass
    assert precious.read_text() == "mine"


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", ["torch", "torch_legacy", "pickle"])
def test_a_pickle_under_our_name_is_refused_unopened(tmp_path: Path, protocol: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "best.safetensors"
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Hostile(marker)))
    else:
        zipped = protocol == "torch"
        torch.save(Hostile(marker), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"not a readable checkpoint .*pickled \.pth files are nev"):
        checkpoint.load(path)
    assert not marker.exists()
    if protocol == "pickle":  # the bait works: whoever unpickles it does create the marker
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_any_flipped_byte_is_noticed(tmp_path: Path, mask: int) -> None:
    """Header, names, JSON, checksum and numbers alike; never another exception, never silence."""
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"w": torch.arange(3.0)}, {"epoch": 1})
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= mask
        path.write_bytes(bad)
        with pytest.raises(UserError):
            checkpoint.load(path)


def test_a_flipped_number_is_called_damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged: its checksum does not match its content"):
        checkpoint.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"is not a 'recbole_simdiff checkpoint 1' \(it says None"):
        checkpoint.load(path)
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it says 'pt'"):
        checkpoint.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors does not exist; give a"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path)


def test_find_takes_a_folder_or_a_file(path: Path) -> None:
    assert checkpoint.resolve(path.parent, "last.safetensors") == path
    assert checkpoint.resolve(path, "best.safetensors") == path
    with pytest.raises(UserError, match=r"no checkpoint at .*best\.safetensors; give a run folder"):
        checkpoint.resolve(path.parent, "best.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.resolve(path.parent / "elsewhere", "last.safetensors")


def test_split_takes_whole_prefixes_only() -> None:
    tensors = {"model.a.b": torch.ones(1), "modelx.c": torch.ones(1), "rng.model.d": torch.ones(1)}
    assert list(checkpoint.subset(tensors, "model")) == ["a.b"]


def test_others_may_read_a_run(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        checkpoint.save(tmp_path / "a.safetensors", {}, {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_content_is_not_limited_by_the_header_of_the_format(tmp_path: Path) -> None:
    """safetensors refuses headers over 100 MB; id maps of large data sets are larger."""
    content = {"items": "x" * 101_000_000}
    checkpoint.save(tmp_path / "a.safetensors", {}, content)
    assert checkpoint.load(tmp_path / "a.safetensors")[1] == content


def test_the_digest_is_of_names_types_shapes_and_values() -> None:
    """It names files in the cache: whatever differs must give another, and nothing else may."""
    base = {"a": torch.arange(6, dtype=torch.int64), "b": torch.zeros(2)}
    wanted = files.digest(base)
    assert wanted == files.digest({"b": torch.zeros(2), "a": torch.arange(6)})
    others = [
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        base | {"a": base["a"].int()},
        base | {"a": base["a"].view(2, 3)},
        base | {"a": base["a"].flip(0)},
        base | {"b": torch.zeros(2, dtype=torch.bfloat16)},
        base | {"b": torch.tensor([0.0, -0.0])},
        {},
    ]
    assert len({wanted, *map(files.digest, others)}) == 1 + len(others)


def test_the_digest_of_any_layout_in_memory() -> None:
    square = torch.arange(6.0).view(2, 3)
    strided, copied = {"a": square.t()}, {"a": square.t().contiguous()}
    assert files.digest(strided) == files.digest(copied)
    assert files.digest(strided) != files.digest({"a": square.reshape(3, 2)})
    for tensor in (torch.tensor(1.0), torch.zeros(0, 4), torch.tensor([True])):
        assert len(files.digest({"a": tensor})) == 32
