"""How far a search is, on disk: one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field
from torch import distributed as dist
from typing_extensions import Self

from dlp_plugin.files import replacing
from dlp_plugin.planning.plan import SearchStep

__all__ = ["Progress", "digest", "forget", "write"]


class Progress(BaseModel):
    """What every search has to go on from.

    :param fingerprint: of its start, samples and settings
    :param sparsities: of every Linear
    :param steps: what was measured so far
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    fingerprint: str
    sparsities: dict[str, Annotated[float, Field(ge=0, le=1)]]
    steps: list[SearchStep] = Field(min_length=1)

    def names(self) -> list[list[str]]:
        """What each of its mappings is about, to be compared with what the search is about."""
        return [list(self.sparsities)]

    @classmethod
    def load(cls, path: str | Path | None, fingerprint: str, names: list[list[str]]) -> Self | None:
        """What an interrupted search of the very same start, samples and settings left.

        The first process of several writes it, and reads it for all.

        :param path: where it is; None for nowhere
        :param names: as :meth:`names` must give them
        """
        state: Self | None = None
        if path is not None and is_source_process() and Path(path).is_file():
            try:
                state = cls.model_validate_json(Path(path).read_bytes())
                if state.fingerprint != fingerprint:
                    logger.warning("{} is of another search; this one begins anew", path)
                    state = None
                elif state.names() != names:
                    raise ValueError("it names other Linears")
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                logger.warning(
                    "{} is damaged, or of another version ({}); the search begins anew",
                    path,
                    reason,
                )
                state = None
        if is_distributed():
            shared = [state]
            dist.broadcast_object_list(shared, src=get_source_rank())
            state = shared[0]
        return state


def write(path: str | Path | None, progress: Progress) -> None:
    """Write it down, on the first of several processes; nowhere if there is no path."""
    if path is not None and is_source_process():
        with replacing(path) as beside:
            beside.write_text(progress.model_dump_json())


def forget(path: str | Path) -> None:
    """Remove what a search has written of its progress, once its plan is safe."""
    if is_source_process():
        Path(path).unlink(missing_ok=True)


def digest(content: object) -> str:
    """Tells contents of JSON apart."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
