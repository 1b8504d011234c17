"""The documentation site: pages from the notebooks as they are saved, a reference from docments. `make docs` builds it."""

import sys
from configparser import ConfigParser
from pathlib import Path

import jupyter_server_mathjax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import pages

pages.gather(ROOT, ROOT / "_docs" / "source")

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
release = version = settings["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["**.ipynb_checkpoints", "nbs/index.ipynb"]
default_role = "code"

# Notebooks are shown with the outputs that they were saved with: a site is built in seconds and says what the repository says.
nb_execution_mode = "off"
nb_custom_formats = {".ipynb": "pages.read_notebook"}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"  # pages.py writes them beside what docments say
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static", str(Path(jupyter_server_mathjax.__file__).parent / "static")]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": settings["git_url"],
    "repository_branch": settings["branch"],
    "use_repository_button": True,
    "use_download_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
}

# Formulas are drawn by the MathJax that Jupyter packages: a built site asks no server for anything.
mathjax_path = "MathJax.js"
mathjax2_config = {
    "config": ["TeX-AMS-MML_HTMLorMML-full.js"],
    "tex2jax": {"inlineMath": [["\\(", "\\)"]], "displayMath": [["\\[", "\\]"]], "processClass": "math", "ignoreClass": "document"},
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "linebreaks": {"automatic": True}},
    "messageStyle": "none",
}


def add_contents(app, docname, source):
    "The README says nothing of a table of contents: the site's first page gets one."
    if docname == "index":
        source[0] += f"\n\n{pages.contents(ROOT)}\n"


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", pages.short_signature)
    app.connect("autodoc-process-docstring", pages.tell_parameters)
    app.connect("autodoc-skip-member", pages.is_told_elsewhere)
