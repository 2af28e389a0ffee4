"""Downloads from a server on this machine: resumed, checked, whole or not there at all."""

import hashlib
import http.server
import io
import json
import logging
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data import download as module
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loading import LoadingFixes
from recbole_simdiff.errors import UserError
from tests.conftest import SEQUENCES, write_inter

NAME = "amazon-beauty"
FILES = {".amazon-beauty.zip.lock", "amazon-beauty.download.json", "amazon-beauty.inter"}


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, and breaks connections when asked to.

    Attributes:
        content (bytes): of the file.
        etag (str | None): its version.
        most (int | None): bytes of an answer after which the connection is closed.
        ranges (list): the ``Range`` of each request, in order.
        status (int): of the answers, where it is an error.
    """

    content = b""
    etag: str | None = '"1"'
    most: int | None = None
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = list[str | None]()

    @property
    def url(self) -> str:
        """Of the file."""
        return f"http://127.0.0.1:{self.server_port}/Amazon_Beauty.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with all of the file, or the rest of the version that is asked for."""

    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.server.status >= 400:
            self.send_error(self.server.status)
            return
        content, start = self.server.content, 0
        if wanted and self.headers["If-Range"] == self.server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        end = None if self.server.most is None else start + self.server.most
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that RecBole's list of downloads points at."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(LoadingFixes, "_get_download_url", lambda *_, **__: running.url)
        running.content = packed(tmp_path)
        yield running
        running.shutdown()
        thread.join()


def packed(tmp_path: Path, filler: bytes = b"") -> bytes:
    """A zip of atomic files, called after the provider's name."""
    source = write_inter(tmp_path / "remote", "Amazon_Beauty", SEQUENCES)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.write(source, source.name)
        archive.writestr("README", filler)
    return stream.getvalue()


@pytest.fixture
def config(make_config: Any) -> Any:
    """Config of a data set that RecBole can download."""
    none = {f"{kind}_inter_num_interval": "[0,inf)" for kind in ("user", "item")}
    return make_config(dataset=NAME, MAX_ITEM_LIST_LENGTH=4, **none)


@pytest.fixture
def folder(config: Any) -> Path:
    return Path(config["data_path"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_download_says_its_terms_and_is_recorded(
    server: Server, config: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert create_dataset(config).build()[2].statistics.actions == 30
    assert names(folder) == FILES
    record = json.loads((folder / f"{NAME}.download.json").read_text())
    assert record["url"] == server.url
    assert record["bytes"] == len(server.content)
    assert record["files"] == [f"{NAME}.inter"]
    assert f"{NAME}: licence: {record['licence']}" in caplog.text
    create_dataset(config)
    assert len(server.ranges) == 1


def test_a_broken_transfer_is_resumed(server: Server, config: Any, folder: Path) -> None:
    """Within a start, as long as something new arrives."""
    server.most = len(server.content) // 3
    create_dataset(config)
    n = server.most
    starts = range(0, len(server.content), n)
    assert server.ranges == [None, *(f"bytes={start}-" for start in starts if start)]
    assert names(folder) == FILES


def test_what_arrived_is_kept_for_the_next_start(
    server: Server, config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_rest = module._fetch_rest

    def once(url: str, part: Path) -> bool:
        fetch_rest(url, part)
        raise KeyboardInterrupt

    server.most = 100
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fetch_rest", once)
        with pytest.raises(KeyboardInterrupt):
            create_dataset(config)
    part = folder / f"{NAME}.zip.part"
    assert part.read_bytes() == server.content[:100]
    assert not (folder / f"{NAME}.inter").exists()
    server.most = None
    create_dataset(config)
    assert server.ranges == [None, "bytes=100-"]
    assert names(folder) == FILES


@pytest.mark.parametrize("etag", ['"2"', None])
def test_another_version_is_begun_anew(
    server: Server, config: Any, folder: Path, etag: str | None, tmp_path: Path
) -> None:
    folder.mkdir()
    module._fetch_rest(server.url, folder / f"{NAME}.zip.part")
    part = folder / f"{NAME}.zip.part"
    part.write_bytes(part.read_bytes()[:100])
    server.etag, server.content = etag, packed(tmp_path, b"another version")
    create_dataset(config)
    assert server.ranges[1] == "bytes=100-"
    assert names(folder) == FILES


def test_more_than_there_is_is_begun_anew(server: Server, config: Any, folder: Path) -> None:
    folder.mkdir()
    part = folder / f"{NAME}.zip.part"
    module._fetch_rest(server.url, part)
    part.write_bytes(part.read_bytes() + b"more")
    create_dataset(config)
    assert names(folder) == FILES
    assert server.ranges[2] is None


def test_a_later_download_must_have_the_recorded_checksum(
    server: Server, config: Any, folder: Path, tmp_path: Path
) -> None:
    create_dataset(config)
    inter = folder / f"{NAME}.inter"
    before = inter.read_bytes()
    inter.unlink()
    create_dataset(config)
    assert inter.read_bytes() == before
    inter.unlink()
    server.content = packed(tmp_path, b"another version")
    with pytest.raises(UserError, match=r"former download in .*json, which may be removed"):
        create_dataset(config)
    assert names(folder) == FILES - {inter.name}
    (folder / f"{NAME}.download.json").unlink()
    create_dataset(config)
    assert names(folder) == FILES


def test_a_shipped_checksum_is_compared(
    server: Server, config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_yaml", lambda _: {NAME: {"sha256": "0" * 64}})
    with pytest.raises(UserError) as caught:
        create_dataset(config)
    message, received = str(caught.value), hashlib.sha256(server.content).hexdigest()
    assert f"received {len(server.content):,} bytes with SHA-256 {received}" in message
    assert f"expected {'0' * 64}, that of this package's list of downloads" in message
    assert "Start again" in message
    assert "Fetch it by hand, unpack it there" in message
    assert "download.json" not in message  # there is none
    assert not (folder / f"{NAME}.inter").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "what arrived is no zip archive"),
        (b"PK\x05\x06" + bytes(18), r"the archive has no Amazon_Beauty\.inter; it has \[\]"),
    ],
)
def test_what_is_no_data_set_leaves_no_file(
    server: Server, config: Any, folder: Path, content: bytes, message: str
) -> None:
    server.content = content
    with pytest.raises(UserError, match=message):
        create_dataset(config)
    assert not (folder / f"{NAME}.inter").exists()
    assert not (folder / f"{NAME}.download.json").exists()


def test_a_failure_while_unpacking_leaves_no_inter(
    server: Server, config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Any, target: Any) -> None:
        target.write(source.read(10))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", fail)
        with pytest.raises(UserError, match="No space left on device"):
            create_dataset(config)
    assert not (folder / f"{NAME}.inter").exists()
    create_dataset(config)
    assert names(folder) == FILES


def test_a_failed_download_says_what_to_do_and_is_tried_again(
    server: Server, config: Any, folder: Path
) -> None:
    server.status = 503
    with pytest.raises(UserError) as caught:
        create_dataset(config)
    message = str(caught.value)
    assert f"{folder}/{NAME}.inter does not exist" in message
    assert f"{server.url} failed (HTTP Error 503" in message
    assert "Fetch it by hand, unpack it there, or set --data_path" in message
    server.status = 200
    create_dataset(config)
    assert names(folder) == FILES


def test_connections_without_a_byte_come_to_an_end(
    server: Server, config: Any, folder: Path
) -> None:
    server.most = 0
    with pytest.raises(UserError, match="the connection was closed before the end"):
        create_dataset(config)
    assert len(server.ranges) == module._ATTEMPTS


def test_offline_downloads_nothing(server: Server, make_config: Any) -> None:
    config = make_config(dataset=NAME, offline=True)
    with pytest.raises(UserError, match=r"offline=True downloads nothing\. Fetch http.* by hand"):
        create_dataset(config)
    assert server.ranges == []
    assert not Path(config["data_path"]).is_dir()


def test_files_put_there_by_hand_are_taken(server: Server, config: Any, folder: Path) -> None:
    """Also after a download that failed."""
    server.status = 404
    with pytest.raises(UserError, match="HTTP Error 404"):
        create_dataset(config)
    write_inter(folder.parent, NAME, SEQUENCES)
    create_dataset(config)
    assert len(server.ranges) == 1


def test_each_data_set_with_settings_has_terms() -> None:
    terms = read_yaml(properties_dir() / "downloads.yaml")
    assert {path.stem for path in (properties_dir() / "dataset").glob("*.yaml")} == terms.keys()
    assert all(row["licence"] for row in terms.values())
