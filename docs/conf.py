"""Sphinx builds the pages of this folder and the API reference from the docstrings: `make docs`."""

import frd_kernels

project = "frd_kernels"
author = "The frd_kernels authors"
release = frd_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
exclude_patterns = ["_build"]
# Pages link to files of the repository, which GitHub shows and this site does not hold.
suppress_warnings = ["myst.xref_missing"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# Public names are documented where users import them from.
add_module_names = False
