"""The site: it builds without a warning, has a page per exhibit, an entry per public function, and needs no network."""

import hashlib
import re
import subprocess
import sys

import pytest

import limbeck.adapters
import limbeck.losses
import limbeck.training
from limbeck import paths

DOCS = paths.ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_each_exhibit_has_a_page_with_its_picture_and_a_card(site):
    files = [path for path in paths.RESULTS.glob("*/*/*.json") if (path.parent / f"{path.stem}.svg").is_file()]
    exhibits = {"/".join(path.parts[-3:]).removesuffix(".json") for path in files}
    exhibits = {exhibit for exhibit in exhibits if exhibit.startswith(("default/", "full/", "bench/"))}
    gallery = (site / "generated" / "gallery.html").read_text()
    assert exhibits == set(re.findall(r'href="exhibits/(\w+/\w+/\w+)\.html"', gallery))
    for exhibit in exhibits:
        page = (site / "generated" / "exhibits" / f"{exhibit}.html").read_text()
        assert "<img" in page and "Reading." in page, exhibit
        assert f'href="exhibits/{exhibit}.html"' in gallery


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["sinkd", "nola", "kdrl"])
def test_an_executed_notebook_that_the_claims_name_is_the_one_of_its_profile(site, paper):
    named = re.findall(r"\(([a-z]+)/executed/(\w+/\w+)\.ipynb\)", (paths.RESULTS / f"{paper}.md").read_text())
    page = (site / "generated" / "claims" / f"{paper}.html").read_text()
    links = re.findall(r'href="\.\./exhibits/(\w+)/(\w+/\w+)\.html"[^>]*>(?:<[^>]+>)*executed<', page)
    assert named and links == named


@pytest.mark.slow
@pytest.mark.parametrize("package", [limbeck.losses, limbeck.adapters, limbeck.training], ids=lambda x: x.__name__)
def test_each_public_name_has_an_entry(site, package):
    page = (site / "api" / f"{package.__name__.partition('.')[2]}.html").read_text()
    assert not [name for name in package.__all__ if f'id="{package.__name__}.{name}"' not in page]


@pytest.mark.slow
def test_no_page_needs_the_network_and_no_link_inside_is_dead(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', text), page
        for address in re.findall(r'href="([^"#:?]+\.html)["#]', text):
            assert (page.parent / address).is_file(), (page, address)


def test_mathjax_is_the_one_that_is_named():
    name = re.search(r"sha256 (\w{64})", (DOCS / "conf.py").read_text())[1]
    assert hashlib.sha256((DOCS / "_static" / "mathjax.js").read_bytes()).hexdigest() == name
