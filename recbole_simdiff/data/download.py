"""Downloads of data sets: resumed where they stopped, checked, and whole or not there at all.

NAME/NAME.zip.part        what has arrived; the next start asks for the rest
NAME/NAME.zip.part.json   from where, and which version of the file it is
NAME/NAME.download.json   what was downloaded; a later download must have the same checksum
"""

import http.client
import json
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.manifest import sha256
from recbole_simdiff.errors import UserError
from recbole_simdiff.files import locked, write_atomically
from recbole_simdiff.log import logger

_CHUNK = 2**20

_TIMEOUT = 60.0  # seconds without an answer

_ATTEMPTS = 5  # that bring nothing new


def record_path(folder: Path, name: str) -> Path:
    """Where a finished download is recorded."""
    return folder / f"{name}.download.json"


def is_unfinished(folder: Path, name: str) -> bool:
    """Whether a download began here that has not left its files of interactions."""
    if record := _read(record_path(folder, name)):
        files = [folder / file for file in record["files"] if file.endswith(".inter")]
        return not all(file.is_file() for file in files)
    began = _part(folder, name).exists() or _lock(folder, name).exists()
    return began and not any(folder.glob("*.inter"))


def download(name: str, url: str, folder: Path) -> None:
    """Fetch a zip of atomic files and unpack them, ``NAME.inter`` last.

    Args:
        name (str): of the data set, which the files are called after.
        url (str): of the zip, whose files are called after it.
        folder (Path): of the data set; made if needed.

    Raises:
        UserError: if the checksum is not that of a former download, or it is no zip of such files.
        OSError: if the server cannot be reached; what has arrived is kept.
    """
    part, record = _part(folder, name), record_path(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(_lock(folder, name)):
        if not is_unfinished(folder, name) and record.is_file():  # by another process
            return
        terms = read_yaml(properties_dir() / "downloads.yaml").get(name, {})
        logger.info(f"{name}: downloading {url}")
        logger.info(f"{name}: licence: {terms.get('licence', 'not known here; ask the provider')}")
        _fetch(url, part)
        checksum, size = sha256(part), part.stat().st_size
        expected = terms.get("sha256") or _read(record).get("sha256") or checksum
        if checksum != expected:
            _forget(part)
            source = f"that of the former download in {record}, which may be removed"
            if "sha256" in terms:
                source = "that of this package's list of downloads"
            raise UserError(
                f"received {size:,} bytes with SHA-256 {checksum}, expected {expected}, {source}. "
                "The transfer was damaged, or the provider changed the file. Start again"
            )
        content = {"url": url, "sha256": checksum, "bytes": size, **terms}
        _unpack(part, name, PurePosixPath(url).stem, content, record)
        _forget(part)


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.zip.part"


def _lock(folder: Path, name: str) -> Path:
    return folder / f".{name}.zip.lock"


def _validator_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _forget(part: Path) -> None:
    for path in (part, _validator_path(part)):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, "utf-8"))


def _fetch(url: str, part: Path) -> None:
    """Bring the file to its end, asking again for the rest when a connection breaks."""
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _fetch_rest(url, part):
                return
            error: Exception = OSError("the connection was closed before the end")
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as reason:
            error = reason
        arrived = part.stat().st_size if part.is_file() else 0
        failures = 0 if arrived > before else failures + 1
        if failures == _ATTEMPTS or isinstance(error, urllib.error.URLError):
            kept = f"; {arrived:,} bytes are kept, and the next start goes on" if arrived else ""
            raise OSError(f"{error}{kept}") from error


def _fetch_rest(url: str, part: Path) -> bool:
    """Ask once for what has not arrived; whether the file is complete."""
    known = _read(_validator_path(part))
    start = part.stat().st_size if part.is_file() and known.get("url") == url else 0
    request = urllib.request.Request(url)
    if start:  # a server whose file is another one by now sends all of it
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known["validator"])
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        _forget(part)  # more has arrived than there is
        return False
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            start = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if not start:
            _forget(part)
            validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if validator:  # without one, nobody can tell whether the rest belongs to the beginning
                _write(_validator_path(part), {"url": url, "validator": validator})
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None)
        with open(part, "ab") as file, bar:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size == total


def _unpack(archive: Path, name: str, stem: str, content: Mapping[str, Any], record: Path) -> None:
    """Atomic files of a zip under the data set's name; the record, then ``NAME.inter``, are last.

    Raises:
        UserError: if it is no zip, or has no such file.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = {
                PurePosixPath(info.filename).name.replace(stem, name): info
                for info in packed.infolist()
                if not info.is_dir() and stem in PurePosixPath(info.filename).stem
            }
            if not any(file.endswith(".inter") for file in members):
                raise UserError(f"the archive has no {stem}.inter; it has {packed.namelist()[:5]}")
            for file in sorted(members, key=lambda file: file.endswith(".inter")):
                if file.endswith(".inter"):
                    _write(record, {**content, "files": sorted(members)})

                def extract(path: str, file: str = file) -> None:
                    with packed.open(members[file]) as source, open(path, "wb") as target:
                        shutil.copyfileobj(source, target)

                write_atomically(archive.parent / file, extract)
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        _forget(archive)
        raise UserError(f"what arrived is no zip archive ({error})") from error
