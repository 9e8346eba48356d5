"""Settings of the documentation; `make docs` builds it with warnings as errors and without a network."""

import lightning_plugins

project = "lightning-plugins"
author = "The lightning-plugins authors"
copyright = "The lightning-plugins authors"
version = release = lightning_plugins.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lightning-plugins {release}"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True  # the fields of a NamedTuple are documented once, by autodoc
