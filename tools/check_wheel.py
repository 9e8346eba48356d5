"""Build the wheel and the sdist, check their contents, install the wheel elsewhere, and use it from an empty folder.

    python tools/check_wheel.py                   # in a bare environment: downloads torch and Lightning
    python tools/check_wheel.py --extras          # and one environment more for each extra
    python tools/check_wheel.py --borrow FOLDER   # dependencies from an installed site-packages; nothing is downloaded
    python tools/check_wheel.py --notebooks 2     # and every notebook, of so many steps, with the extra `examples`
    python tools/check_wheel.py --notebooks 2 --only linear_probe     # or these alone

"Use" means: import every module, without extras, and run the first program of README.md, with the names of
`pytorch_lightning`, which the package depends on, unless the extra is `lightning`. The times are printed.
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from notebook_runs import run_notebooks

ROOT = Path(__file__).resolve().parents[1]
NAME = "lightning_plugins"
# Import names of the extras' packages: hidden in environments that have them all.
EXTRAS = (
    *("captum", "comet_ml", "jsonargparse", "matplotlib", "mlflow", "neptune", "onnx", "onnxruntime", "onnxscript"),
    *(
        "optuna",
        "pandas",
        "rich",
        "safetensors",
        "scikit_learn",
        "scipy",
        "sklearn",
        "timm",
        "torch_pruning",
        "torchao",
    ),
    *("torchvision", "transformers", "wandb", "wfdb"),
)
IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
class Rest:  # everything but the named packages: neither they nor their metadata are found
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in sys.argv else PathFinder.find_spec(name, path, target)
    @staticmethod
    def find_distributions(context):
        found = PathFinder.find_distributions(context)
        return (one for one in found if one.name.lower().replace("-", "_") not in sys.argv)
sys.meta_path = [Rest if finder is PathFinder else finder for finder in sys.meta_path]
import lightning_plugins
loaded, need = 0, []
for module in pkgutil.walk_packages(lightning_plugins.__path__, "lightning_plugins."):
    if module.name.endswith("__main__"):
        continue
    try:
        found = importlib.import_module(module.name)
        loaded += 1
    except ImportError as error:  # a module behind a public name, which says so below, or one that says so itself
        if "lightning-plugins[" not in str(error) and getattr(error, "name", None) is None:
            raise
        need.append(module.name)
        continue
    for name in getattr(found, "__all__", ()):
        try:
            getattr(found, name)
        except ImportError as error:
            if "lightning-plugins[" not in str(error):
                raise
            need.append(f"{module.name}.{name}")
print(f"{loaded} modules imported from {lightning_plugins.__path__[0]}")
print(f"an extra is needed by {', '.join(need) or 'none'}")
"""


def build(target: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, built from a copy of the tracked files only."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, tracked.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        for kind in ("wheel", "sdist"):
            code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
            subprocess.run([sys.executable, "-c", code, str(target)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def names_in(archive: Path) -> list[str]:
    """The files of a wheel, or of an sdist below its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return [name for name in opened.namelist() if not name.endswith("/")]
    with tarfile.open(archive) as opened:
        return [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]


def complaints(archive: Path) -> list[str]:
    """Complaints about the contents of a wheel or an sdist."""
    names = names_in(archive)
    found = [f"{archive.name} holds {name}" for name in names if re.search(r"(^|/)(tests?|conftest\.py)(/|$)", name)]
    if not any(name.rpartition("/")[2] == "LICENSE" for name in names):
        found.append(f"{archive.name} has no LICENSE")
    if f"{NAME}/py.typed" not in names:
        found.append(f"{archive.name} has no {NAME}/py.typed")
    if archive.suffix == ".whl":
        others = [name for name in names if not name.startswith((f"{NAME}/", f"{NAME}-"))]
        found += [f"{archive.name} holds {name}, which is no part of the package" for name in others]
        missing = {str(path.relative_to(ROOT)) for path in (ROOT / NAME).rglob("*.py")} - set(names)
        found += [f"{archive.name} lacks {name}" for name in sorted(missing)]
    return found


def first_program(package: str) -> str:
    """The first program of README.md, for a reader with the given Lightning package."""
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    if found is None:
        raise SystemExit("README.md has no program")
    return found[1].replace("lightning.pytorch", package)


def environment(folder: Path, wheel: Path, extra: str | None, borrow: Path | None) -> Path:
    """The Python of a new environment with the wheel, and optionally an extra or borrowed dependencies."""
    venv.create(folder, with_pip=borrow is None, clear=True)
    python = folder / "bin" / "python"
    if borrow is not None:
        (site,) = (folder / "lib").glob("python*/site-packages")
        shutil.unpack_archive(wheel, site, "zip")
        (site / "borrowed.pth").write_text(f"{borrow}\n", encoding="utf-8")
    else:
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
    return python


def use(python: Path, *arguments: str, **environment: str) -> str:
    """Run Python in an empty folder, outside the clone and without its paths; returns its output."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [python, *arguments], cwd=folder, env={**kept, **environment}, capture_output=True, text=True, check=False
        )
    if finished.returncode:
        raise SystemExit(f"{arguments[:1]} failed:\n{finished.stdout}\n{finished.stderr}")
    return finished.stdout.strip()


def try_out(work: Path, wheel: Path, extra: str | None, borrow: Path | None) -> Path:
    """Install the wheel, import everything, and run the first program; print the times."""
    began = time.perf_counter()
    python = environment(work / (extra or "bare"), wheel, extra, borrow)
    installed = time.perf_counter()
    print(use(python, "-c", IMPORT_ALL, *(EXTRAS if borrow else ())))
    imported = time.perf_counter()
    print(use(python, "-c", first_program("lightning.pytorch" if extra == "lightning" else "pytorch_lightning")))
    ran = time.perf_counter()
    print(
        f"{extra or 'no extra'}: installed in {installed - began:.0f} s, everything imported in "
        f"{imported - installed:.0f} s, the first program of README.md ran in {ran - imported:.0f} s"
    )
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--borrow", type=Path, help="a site-packages folder that has the dependencies")
    parser.add_argument("--extras", action="store_true", help="try each extra in an environment of its own")
    parser.add_argument("--notebooks", metavar="STEPS", help="run the notebooks too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the notebooks, these")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args()

    archives = build(options.dist.resolve())
    for archive in archives:
        print(f"{archive.name}: {len(names_in(archive))} files, {archive.stat().st_size / 1024:.0f} KiB")
    found = [complaint for archive in archives for complaint in complaints(archive)]
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, archives)], check=True)

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [name for name in setup["options.extras_require"] if name not in ("dev", "docs", "test", "examples")]
    with tempfile.TemporaryDirectory() as work:
        python = try_out(Path(work), archives[0], None, options.borrow)
        for extra in extras if options.extras and options.borrow is None else ():
            try_out(Path(work), archives[0], extra, None)
        if options.notebooks:
            if options.borrow is None:
                python = environment(Path(work) / "examples", archives[0], "examples", None)
            settings = {"EXAMPLE_STEPS": options.notebooks}
            failed = run_notebooks(partial(use, python), settings, options.only, EXTRAS if options.borrow else ())
            return bool(failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
