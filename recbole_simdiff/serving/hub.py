"""Checkpoints on the Hugging Face Hub, with their model card and without users (extra ``hub``)."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_atomically, write_text
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.serving.card import card
from recbole_simdiff.serving.strip import strip

CARD = "README.md"  # the name that the Hub shows


def push(place: str | Path, repository: str) -> str:
    """Upload a checkpoint without users, and its card, to a repository; a new one is private.

    Who uploads is known to huggingface_hub, by its login or its variables.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        repository (str): OWNER/NAME.

    Returns:
        str: address of the commit.

    Raises:
        UserError: if the checkpoint cannot be used, or the upload fails.
    """
    with TemporaryDirectory() as name, _explained(repository):
        from huggingface_hub import HfApi

        folder, api = Path(name), HfApi()
        strip(place, folder / BEST)
        write_text(folder / CARD, card(place, without_users=True))
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="A checkpoint of recbole_simdiff",
            allow_patterns=[BEST, CARD],
        )
        return str(done.commit_url)


def pull(repository: str, folder: Path) -> Path:
    """Download what ``push`` uploaded. No code is downloaded or run.

    Args:
        repository (str): OWNER/NAME.
        folder (Path): becomes a run folder; must not hold a checkpoint.

    Returns:
        Path: the checkpoint.

    Raises:
        UserError: if the folder holds a checkpoint, the download fails, or it is no checkpoint.
    """
    if (folder / BEST).exists():
        raise UserError(f"--output={folder} holds a {BEST} already; name another folder")
    with TemporaryDirectory() as name, _explained(repository):
        from huggingface_hub import HfApi

        api = HfApi()
        there = {
            file: Path(api.hf_hub_download(repository, file, local_dir=name))
            for file in (CARD, BEST)
        }
        load_run(there[BEST])
        folder.mkdir(parents=True, exist_ok=True)
        for file, path in there.items():
            write_atomically(folder / file, lambda target, path=path: shutil.copyfile(path, target))
    return folder / BEST


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Within the block, errors of the Hub and a missing extra are the user's to mend."""
    try:
        import huggingface_hub  # noqa: F401
        from httpx import HTTPError, InvalidURL
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"push and pull need the extra hub: pip install 'recbole_simdiff[hub]' ({error})"
        ) from error
    failures = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, HTTPError, InvalidURL)
    try:
        yield
    except failures as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"--repository={repository}: {type(error).__name__}: {first}") from error
