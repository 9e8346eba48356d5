"""The command line: ``lightning-plugins compress`` and ``lightning-plugins inspect``."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit status: 0, or 1 after an error, which is printed to stderr. Invalid command-line arguments raise
        `SystemExit` with status 2, as usual.

    Example:
        >>> main(["inspect", "no such file"])  # stderr: `checkpoint` must be a file, and 'no such file' does not exist
        1
    """
    try:
        import rich  # noqa: F401  # only to see whether it is there
        from jsonargparse import auto_cli
    except ImportError as error:
        sys.stderr.write(f"error: the command line needs jsonargparse and rich ({error}); ")
        sys.stderr.write("run `pip install 'lightning-plugins[cli]'`\n")
        return 1
    from lightning_plugins.cli._compress import compress
    from lightning_plugins.cli._inspect import inspect

    arguments = None if argv is None else list(argv)
    try:
        auto_cli({"compress": compress, "inspect": inspect}, args=arguments, prog="lightning-plugins")
    except (ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
