"""Settings of the documentation; `make docs` builds it with warnings as errors and without a network."""

import sys
from pathlib import Path

import lightning_plugins

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tools"))
import gallery

gallery.write_pages(HERE / "gallery")

project = "lightning-plugins"
author = "The lightning-plugins authors"
copyright = "The lightning-plugins authors"
version = release = lightning_plugins.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the gallery's outputs come from tools/gallery.py
nb_merge_streams = True  # lines that were printed one by one stand in one block
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
