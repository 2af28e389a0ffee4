"""A checkpoint without the users it was trained on, which may be given to others."""

from pathlib import Path

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.runs.without_users import users_left_out
from recbole_simdiff.serving.recommender import load


def strip(place: str | Path, path: Path) -> None:
    """Write a checkpoint that recommends to histories and holds no user, history or state.

    It cannot be resumed or evaluated.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        path (Path): the file to write, a .safetensors file.

    Raises:
        UserError: if the checkpoint cannot be used, its model reads users, or the file to write is
            the checkpoint itself.
    """
    source = checkpoint.resolve(place, BEST)
    if path.suffix != ".safetensors":
        raise UserError(f"--output={path} must end in .safetensors")
    if path.exists() and path.samefile(source):
        raise UserError(f"--output={path} is the checkpoint itself; name another file")
    recommender = load(source, use_gpu=False)
    recommender.recommend([recommender.item_ids[1:2]], k=1)  # a model that reads users is refused
    checkpoint.save(path, *users_left_out(*load_run(source)))
