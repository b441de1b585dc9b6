"""The site: `make docs`. What results/ holds is copied to docs/generated/, its links made the site's; nothing is run.

docs/_static/mathjax.js is MathJax 3.2.2's es5/tex-svg.js, as npm has it (Apache-2.0, mathjax.LICENSE;
sha256 d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882), so that formulas need no network.
"""

import json
import re
import shutil
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "docs" / "generated"
PAPERS = {"sinkd": "SinKD", "nola": "NOLA", "kdrl": "KDRL"}
PROFILES = ("default", "full", "bench")
PAGES = ("REPRODUCIBILITY.md", "CONTRIBUTING.md", "docs/map.md", "docs/own-data.md", "data/README.md")

project, author = "limbeck", "The limbeck authors"
version = release = version_of("limbeck")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_design"]
exclude_patterns = ["package.md", "map.md", "own-data.md", "README.md"]  # the second and third are read as pages
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
html_theme, html_static_path, html_css_files = "pydata_sphinx_theme", ["_static"], ["site.css"]
html_title, html_show_sourcelink, html_copy_source = "limbeck", False, False
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "navigation_with_keys": False,
}
html_sidebars = {"index": []}
mathjax_path = "mathjax.js"
nb_execution_mode, nb_ipywidgets_js = "off", {}
nb_code_prompt_show, nb_code_prompt_hide = "Code", "Code"
myst_enable_extensions, myst_heading_anchors = ["colon_fence", "dollarmath"], 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90


def exhibits() -> list[tuple[str, str, str]]:
    """Profile, paper and name of each exhibit; one that two profiles have is two."""
    folders = [(profile, paper) for profile in PROFILES for paper in PAPERS]
    return [(*of, file.stem) for of in folders for file in sorted((ROOT / "results" / Path(*of)).glob("*.json"))]


def linked(text: str, file: Path, place: Path, pages: dict[Path, str]) -> str:
    """A page of the repository for the site: links lead to the site's pages, pictures stay, other links become text."""

    def target(match: re.Match) -> str:
        picture, words, address = match.groups()
        name, _, anchor = address.partition("#")
        if "://" in address or not name:
            return match[0]
        path = (file.parent / name).resolve()
        if picture:
            return f"![{words}]({Path('../' * (len(place.relative_to(ROOT).parts) - 1)) / path.relative_to(ROOT)})"
        page = pages.get(path)
        page = page and "../" * (len(place.relative_to(ROOT / "docs").parts) - 1) + page
        return f"[{words}]({page}{'#' if anchor else ''}{anchor})" if page else words

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", target, text)


def generate() -> None:
    """Write docs/generated/: the claims, the executed notebooks, the gallery and the other pages."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    places = {ROOT / name: f"generated/{Path(name).name.lower()}" for name in PAGES}
    places[ROOT / "data" / "README.md"] = "generated/data.md"
    places |= {ROOT / "results" / f"{paper}.md": f"generated/claims/{paper}.md" for paper in PAPERS}
    places[ROOT / "results" / "README.md"] = "generated/claims/index.md"
    pages = dict(places)
    pages[ROOT / "README.md"] = "index.md"
    for profile, paper, exhibit in exhibits():
        page = f"generated/exhibits/{profile}/{paper}/{exhibit}.ipynb"
        executed = ROOT / "results" / profile / "executed" / paper / f"{exhibit}.ipynb"
        pages[executed] = page
        pages.setdefault(ROOT / "notebooks" / paper / f"{exhibit}.ipynb", page)
        _notebook(executed, ROOT / "docs" / page)
    for file, page in places.items():
        place = ROOT / "docs" / page
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(linked(file.read_text(), file, place, pages))
    (GENERATED / "gallery.md").write_text(_gallery())


def _notebook(source: Path, place: Path) -> None:
    """An executed notebook with its input folded."""
    content = json.loads(source.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content))


def _gallery() -> str:
    """A card per exhibit, by paper, with its picture."""
    parts = [
        "# Exhibits\n\nEvery figure and table, drawn from committed records. A card opens the executed notebook.\n"
    ]
    for paper, name in PAPERS.items():
        cards = [_card(*exhibit) for exhibit in exhibits() if exhibit[1] == paper]
        parts.append(f"## {name}\n\n::::{{grid}} 1 2 3 3\n:gutter: 3\n\n" + "\n".join(cards) + "::::\n")
    hidden = "\n".join("exhibits/" + "/".join(exhibit) for exhibit in exhibits())
    return "\n".join(parts) + f"\n```{{toctree}}\n:hidden:\n\n{hidden}\n```\n"


def _card(profile: str, paper: str, exhibit: str) -> str:
    notebook = json.loads((ROOT / "notebooks" / paper / f"{exhibit}.ipynb").read_text())
    title = "".join(notebook["cells"][0]["source"]).splitlines()[0].partition(": ")[2]
    title = title[:1].upper() + title[1:]
    picture = f"../../results/{profile}/{paper}/{exhibit}.svg"
    lines = [f":::{{grid-item-card}} {title}", f":link: exhibits/{profile}/{paper}/{exhibit}", ":link-type: doc"]
    return "\n".join([*lines, f":img-top: {picture}", f":img-alt: {title}", f"\n{exhibit} · {profile}\n:::\n"])


def escape(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """Docstrings are plain text: what reStructuredText would read in them is escaped, `names` are code."""
    text = "\n".join(lines)
    parts = re.split(r"`([^`]*)`", text)
    parts[::2] = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    paragraphs = [re.sub(r"\n\s+", "\n", part).strip() for part in "".join(parts).split("\n\n")]
    lines[:] = "\n\n".join(paragraphs).split("\n")


def setup(app) -> None:
    """Generate before the sources are read."""
    generate()
    app.connect("autodoc-process-docstring", escape)
