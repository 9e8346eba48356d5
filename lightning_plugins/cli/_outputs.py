"""Output files of a command: checked for conflicts and written atomically."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def check_outputs(outputs: dict[str, Path], inputs: Iterable[Path], *, force: bool) -> None:
    """Raise an error for outputs that would overwrite each other, an input, or an existing file.

    Args:
        outputs: The files by their contents.
        inputs: Files that the command reads.
        force: Whether existing files may be replaced; never an input, and never twice.

    Raises:
        ValueError: If there is a conflict.
    """
    taken = {_real(path): f"the input {str(path)!r}" for path in inputs}
    for what, path in outputs.items():
        if (real := _real(path)) in taken:
            raise ValueError(f"`output`: the {what} {str(path)!r} would overwrite {taken[real]}; pass another name")
        taken[real] = f"the {what} {str(path)!r}"
    there = [str(path) for path in outputs.values() if path.exists() or path.is_symlink()]
    if folders := [name for name in there if Path(name).is_dir()]:
        raise ValueError(f"`output`: {folders[0]!r} is a folder; pass another name")
    if there and not force:
        raise ValueError(
            f"`output`: {', '.join(map(repr, there))} exists already; pass another name, or `--force true`"
        )


def beside(path: Path, suffix: str) -> Path:
    """A path next to another, with its full name except for checkpoint extensions: ``small-v0.9.json``.

    Args:
        path: The other file.
        suffix: The extension, with its dot.

    Returns:
        The path.
    """
    known = {".ckpt", ".pt", ".pth", ".bin"}
    return path.with_name((path.stem if path.suffix in known else path.name) + suffix)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and move it into place when complete; a link is replaced, not its target.

    Args:
        path: The file.
        write: Writes to a path with the file's extension.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _real(path: Path) -> str:
    return os.path.realpath(path)
