"""Add MathJax to the documentation with the npm client, so that formulas are rendered offline.

Without npm or its registry the documentation is still built, and readers load MathJax from Sphinx's default URL.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.2.2"
TARGET = Path(__file__).resolve().parents[1] / "docs" / "_static" / "mathjax"
FILES = {"package/es5/tex-svg.js": "tex-svg.js", "package/LICENSE": "LICENSE"}


def main() -> int:
    if (TARGET / "tex-svg.js").exists() and (TARGET / "VERSION").read_text(encoding="utf-8") == VERSION:
        return 0
    npm = shutil.which("npm")
    if npm is None:
        print("npm is missing: formulas will need a network", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            [npm, "pack", "--silent", f"mathjax@{VERSION}"], cwd=folder, capture_output=True, text=True, check=False
        )
        archives = list(Path(folder).glob("*.tgz"))
        if packed.returncode or not archives:
            print(f"npm could not fetch MathJax: formulas will need a network\n{packed.stderr}", file=sys.stderr)
            return 0
        TARGET.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for member, name in FILES.items():
                content = archive.extractfile(member)
                if content is None:
                    raise SystemExit(f"mathjax@{VERSION} has no {member}")
                (TARGET / name).write_bytes(content.read())
    (TARGET / "VERSION").write_text(VERSION, encoding="utf-8")
    print(f"MathJax {VERSION} lies in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
