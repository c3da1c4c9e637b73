"""The state of a search on disk, to continue an interrupted one."""

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
    """What any search needs to continue.

    :param fingerprint: of its start, samples and settings
    :param sparsities: of every Linear
    :param steps: what was measured so far
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    fingerprint: str
    sparsities: dict[str, Annotated[float, Field(ge=0, le=1)]]
    steps: list[SearchStep] = Field(min_length=1)

    def names(self) -> list[list[str]]:
        """The names in each of its mappings, to compare with those of the search."""
        return [list(self.sparsities)]

    @classmethod
    def load(cls, path: str | Path | None, fingerprint: str, names: list[list[str]]) -> Self | None:
        """The state of an interrupted search with the same start, samples and settings.

        Of several processes the first one writes it, and reads it for all.

        :param path: file of the state; None for none
        :param names: as :meth:`names` must give them
        """
        state: Self | None = None
        if path is not None and is_source_process() and Path(path).is_file():
            try:
                state = cls.model_validate_json(Path(path).read_bytes())
                if state.fingerprint != fingerprint:
                    logger.warning("{} belongs to another search; this search starts anew", path)
                    state = None
                elif state.names() != names:
                    raise ValueError("it names other Linears")
            except (ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                logger.warning(
                    "{} is damaged or of another version ({}); the search starts anew",
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
    """Save the state, on the first of several processes; without a path nothing is saved.

    :param path: of the file; None to save nothing
    :param progress: the state
    """
    if path is not None and is_source_process():
        with replacing(path) as beside:
            beside.write_text(progress.model_dump_json())


def forget(path: str | Path) -> None:
    """Remove the state of a search, once its plan is saved.

    :param path: of the file
    """
    if is_source_process():
        Path(path).unlink(missing_ok=True)


def digest(content: object) -> str:
    """A fingerprint of JSON content.

    :param content: anything that JSON can hold
    """
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
