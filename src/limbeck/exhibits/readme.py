"""The claim tables of README.md, rewritten from the exhibits' JSON: `python -m limbeck.exhibits.readme`.

Only the text between the two markers changes. Smoke results never appear, since they only check wiring.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck import paths, records

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"
PAPERS = {"sinkd": "SinKD", "nola": "NOLA", "kdrl": "KDRL"}
PROFILES = ("default", "full", "paper", "bench")
NONE_YET = "No exhibit has been written yet; `make reproduce` writes them."


def rewrite(path: Path) -> None:
    """Put the tables between the markers of `path`; a file that would not change is not touched.

    Raises ValueError unless the markers stand there once, in order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"expected {BEGIN} and then {END} once in {path}, got them {text.count(BEGIN)} and {text.count(END)} times"
        )
    before, after = text.split(BEGIN)
    content = f"{before}{BEGIN}\n\n{sections()}\n\n{END}{after.split(END)[1]}"
    if content != text:
        records.replace_text(path, content)


def sections() -> str:
    """One markdown section per paper with an exhibit: the table of claims, then each picture with its reading."""
    parts = []
    for paper, title in PAPERS.items():
        exhibits = [json.loads(file.read_text(encoding="utf-8")) for file in _files(paper, "json")]
        if exhibits:
            parts += [f"### {title}", _table(exhibits), *_pictures(paper)]
    return "\n\n".join(parts) or NONE_YET


def _files(paper: str, suffix: str) -> list[Path]:
    """Files of a paper, by exhibit and then by profile."""
    files = [file for profile in PROFILES for file in sorted((paths.RESULTS / profile / paper).glob(f"*.{suffix}"))]
    return sorted(files, key=lambda file: file.stem)


def _table(exhibits: Iterable[Mapping[str, Any]]) -> str:
    rows = ["| exhibit | claim | ours | verdict | profile |", "|---|---|---|---|---|"]
    for exhibit in exhibits:
        link = "[{exhibit}](notebooks/{paper}/{exhibit}.ipynb)".format(**exhibit)
        for claim in exhibit["claims"]:
            statement = f"{_cell(claim['statement'])}<br><sub>{_cell(claim['rule'])}</sub>"
            rows.append(f"| {link} | {statement} | {_ours(claim)} | {claim['verdict']} | {exhibit['profile']} |")
    return "\n".join(rows)


def _ours(claim: Mapping[str, Any]) -> str:
    if claim["ours"] is None:
        return "–"
    if claim["interval"] is None:
        return f"{claim['ours']:.3g}"
    low, high = claim["interval"]
    return f"{claim['ours']:.3g} [{low:.3g}, {high:.3g}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _pictures(paper: str) -> list[str]:
    """One picture per exhibit, of the first profile that has it, and what its notebook says against it."""
    first = {file.stem: file for file in reversed(_files(paper, "svg"))}
    return [
        f"![{paper}, {stem}](results/{file.parent.parent.name}/{paper}/{stem}.svg)\n\n{_reading(paper, stem)}"
        for stem, file in sorted(first.items())
    ]


def _reading(paper: str, exhibit: str) -> str:
    """The last cell of an exhibit's notebook, under the exhibit's name."""
    cells = json.loads((paths.NOTEBOOKS / paper / f"{exhibit}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = " ".join("".join(cells[-1]["source"]).split())
    return text.replace("**Reading.**", f"**{exhibit}.**", 1)


if __name__ == "__main__":
    rewrite(paths.ROOT / "README.md")
