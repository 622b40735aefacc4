"""The site: the notebooks as they are committed, the teaching guide and the benchmarks. `make site` builds it."""

from importlib.metadata import distribution

project = "curvlib"
author = copyright = "The curvlib developers"  # noqa: A001 - Sphinx's name
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/**/README.md", "data/README.md"]
include_patterns += ["notebooks/*.ipynb", "notebooks/exercises/*.ipynb", "notebooks/studies/*.ipynb"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the benchmarks' pages go from their title to tables at level 3

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"navbar_persistent": []}  # one search box: the sidebar has it
html_copy_source = False
# MathJax of a package in place of a network's, so that formulas show without a network
html_static_path = [
    str(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg.js"))
]
mathjax_path = "tex-svg.js"
