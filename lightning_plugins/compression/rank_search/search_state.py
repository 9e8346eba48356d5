"""A search state on disk: everything needed to resume after a level, replaced atomically."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_plugins._deprecation import share_left
from lightning_plugins.compression.rank_search.problem import Ranks, ScoredRanks, SearchLevel
from lightning_plugins.distributed import gather_row_counts, gather_rows, is_distributed

_FORMAT = 2


class SearchState:
    """Results of a search so far.

    Attributes:
        levels: The trace.
        finished: The rank vectors within the budget, with their scores; None for those that were given up.
    """

    def __init__(self) -> None:
        self.levels: list[SearchLevel] = []
        self.finished: dict[Ranks, float | None] = {}

    def save(self, path: Path, search: dict[str, Any]) -> None:
        """Write the state, with a description of the search it belongs to, on the first process."""
        if is_distributed() and dist.get_rank() != 0:
            return
        content = {
            "format": _FORMAT,
            "search": search,
            "levels": [{**level._asdict(), "beam": [list(one) for one in level.beam]} for level in self.levels],
            "finished": [[list(ranks), score] for ranks, score in self.finished.items()],
        }
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)  # a process that is killed leaves the old state or the new one
        except OSError as error:  # the search itself needs no file
            warnings.warn(
                f"`state_file`: {str(path)!r} could not be written ({error}); a search that is killed starts over",
                stacklevel=2,
            )
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, search: dict[str, Any], device: torch.device) -> "SearchState":
        """Read the first process's file.

        Returns:
            The state; empty if there is no file.

        Raises:
            ValueError: If the file is not one of this search.
        """
        state, text = cls(), _read(path, device)
        if not text:
            return state
        try:
            content = json.loads(text)
            found = _from_removed(content) if content["format"] == 1 else content["format"]
            written = content["search"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`state_file`: {str(path)!r} must be written by a search, but is not; delete it"
            ) from error
        wanted = json.loads(json.dumps(search))
        if found != _FORMAT or written != wanted:
            other = [key for key in wanted if written.get(key) != wanted[key]] or ["format"]
            raise ValueError(
                f"`state_file`: {str(path)!r} must belong to this search, but its {', '.join(other)} "
                f"{'is' if len(other) == 1 else 'are'} another; delete it, or name another file"
            )
        for level in content["levels"]:
            beam = tuple(ScoredRanks(tuple(ranks), score) for ranks, score in level.pop("beam"))
            state.levels.append(SearchLevel(**level, beam=beam))
        state.finished = {tuple(ranks): score for ranks, score in content["finished"]}
        return state


def _from_removed(content: dict[str, Any]) -> int:
    """Bring a file that has removed fractions to the present format, that of shares left."""
    content["search"]["budget"] = share_left(content["search"].pop("ratio", None))
    for level in content["levels"]:
        level["share"], level["budget"] = share_left(level.pop("ratio")), share_left(level.pop("target"))
    return _FORMAT


def _read(path: Path, device: torch.device) -> str:
    """The text of the first process's file, on every process; other machines need not see it."""
    leads = not is_distributed() or dist.get_rank() == 0
    content = path.read_bytes() if leads and path.exists() else b""
    if is_distributed():
        own = torch.tensor(list(content), dtype=torch.uint8, device=device)
        content = bytes(gather_rows(own, gather_row_counts(len(content)))[0].tolist())
    return content.decode("utf-8", errors="replace")
