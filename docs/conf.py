"""Settings of the documentation; `make docs` builds it with warnings as errors and without a network."""

import json
from pathlib import Path

import lightning_plugins

HERE = Path(__file__).parent

project = "lightning-plugins"
author = "The lightning-plugins authors"
copyright = "The lightning-plugins authors"
version = release = lightning_plugins.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the gallery's outputs come from `tools/notebooks.py --execute`
exclude_patterns = ["_build", "executed"]

html_theme = "furo"
html_title = f"lightning-plugins {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
if (HERE / "_static" / "mathjax" / "tex-svg.js").exists():  # from tools/mathjax.py; else readers need a network
    mathjax_path = "mathjax/tex-svg.js"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True  # the fields of a NamedTuple are documented once, by autodoc


def sources(notebook: Path) -> list[str]:
    """The text of a notebook's cells."""
    return ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]


def write_gallery() -> None:
    """Fill docs/gallery: each example with its outputs, or without them if it has changed since it was executed."""
    for notebook in sorted((HERE.parent / "examples").glob("*.ipynb")):
        executed = HERE / "executed" / notebook.name
        shown = executed if executed.exists() and sources(executed) == sources(notebook) else notebook
        target, content = HERE / "gallery" / notebook.name, shown.read_bytes()
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)


write_gallery()
