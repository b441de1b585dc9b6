"""The pages that show claims, rewritten from the exhibits' JSON: `python -m limbeck.exhibits.readme`.

README.md and results/README.md keep their text around two markers; results/<paper>.md is written whole. Smoke results
never appear, since they only check wiring.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck import paths, records
from limbeck.exhibits import claims

BEGIN, END = "<!-- generated:begin -->", "<!-- generated:end -->"
PAPERS = {"sinkd": "SinKD", "nola": "NOLA", "kdrl": "KDRL"}
PROFILES = ("default", "full", "paper", "bench")
VERDICTS = ("agrees", "agrees in direction", "inconclusive", "disagrees", "not tested")
OPEN = ("inconclusive", "not tested")
BOARD = ("main claims", "exact facts", "explorations")  # in the order of claims.ROLES
NOTE = "<!-- written by `make readme` from the exhibits' JSON -->"


def write() -> None:
    """Renew every page; one that would not change is not touched."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            records.replace_text(path, text)


def pages() -> dict[Path, str]:
    """What each page is to say, by its path.

    Raises ValueError for a page without its markers, and for an exhibit whose claims are not those of data/claims.
    """
    drawn = {paper: exhibits(paper) for paper in PAPERS}
    front, index = paths.ROOT / "README.md", paths.RESULTS / "README.md"
    own = {paths.RESULTS / f"{paper}.md": _page(paper, found) for paper, found in drawn.items() if found}
    return {front: _between(front, _scoreboard(drawn)), index: _between(index, _index(drawn)), **own}


def exhibits(paper: str) -> dict[str, list[dict[str, Any]]]:
    """What was drawn of a paper: the exhibits in the order of its claims, each by profile, each claim with its role."""
    stated = {claim.id: claim for claim in claims.load(paper)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in dict.fromkeys(c.exhibit for c in stated.values())}
    for file in (file for profile in PROFILES for file in paths.visible(paths.RESULTS / profile / paper, "*.json")):
        exhibit = records.read_exhibit(file)
        if unknown := [claim["id"] for claim in exhibit["claims"] if claim["id"] not in stated]:
            raise ValueError(f"{file}: expected claims of data/claims/{paper}.yaml, got {unknown}; draw it again")
        for claim in exhibit["claims"]:
            claim |= {"role": stated[claim["id"]].role, "ordered": stated[claim["id"]].rule["kind"] == "monotone"}
        found.setdefault(file.stem, []).append(exhibit)
    return {name: profiles for name, profiles in found.items() if profiles}


def _between(path: Path, content: str) -> str:
    """The text of a page with `content` between its markers."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"expected {BEGIN} and then {END} once in {path}, got them {text.count(BEGIN)} and {text.count(END)} times"
        )
    before, after = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after.split(END)[1]}"


def _scoreboard(drawn: Mapping[str, Mapping[str, Any]]) -> str:
    """How many claims of each paper and role have which verdict, each claim once; then every main claim."""
    board = [
        [f"[{PAPERS[paper]}](results/{paper}.md)", *(_tally(_once(found, role)) for role in claims.ROLES)]
        for paper, found in drawn.items()
    ]
    main = [
        [_place(paper, claim["exhibit"]), _cell(claim["statement"]), *_outcome(claim)]
        for paper, found in drawn.items()
        for claim in _once(found, "main")
    ]
    return f"{_table(['paper', *BOARD], board)}\n\n{_table(['exhibit', 'main claim', 'ours', 'verdict'], main)}"


def _index(drawn: Mapping[str, Mapping[str, Any]]) -> str:
    """One table per paper, of its exhibits and their verdicts, by the first profile that has them."""
    parts = []
    for paper, found in drawn.items():
        rows = [
            [f"[{name}]({paper}.md#{name})", _title(paper, name), first["profile"], *_counts(first["claims"])]
            for name, (first, *_) in found.items()
        ]
        parts += [f"## [{PAPERS[paper]}]({paper}.md)", _table(["exhibit", "what it shows", "profile", *VERDICTS], rows)]
    return "\n\n".join(parts)


def _page(paper: str, found: Mapping[str, list[dict[str, Any]]]) -> str:
    head = f"# {PAPERS[paper]}: its claims and what came out"
    written = f"[the claims as they were written](../data/claims/{paper}.yaml)"
    guide = f"[What the words and columns mean](README.md); {written}."
    listed = "\n".join(f"- [{name}](#{name}): {_title(paper, name)}" for name in found)
    sections = [part for name, drawings in found.items() for part in _section(paper, name, drawings)]
    return "\n\n".join([head, NOTE, guide, listed, *sections]) + "\n"


def _section(paper: str, name: str, drawings: list[dict[str, Any]]) -> list[str]:
    """An exhibit: picture, what was decided, what stayed open, what its notebook says against it, other profiles."""
    first, *others = drawings
    title = _title(paper, name)
    picture = paths.RESULTS / first["profile"] / paper / f"{name}.svg"
    shown = [claim for claim in first["claims"] if claim["role"] == "main" or claim["verdict"] not in OPEN]
    folded = [claim for claim in first["claims"] if claim not in shown]
    parts = [f"## {name}", f"**{title[0].upper()}{title[1:]}.** {_links(paper, name, first['profile'])}"]
    if picture.is_file():
        parts.append(f"![{name}: {title}]({first['profile']}/{paper}/{name}.svg)")
    if shown:
        parts.append(_rows(shown))
    if folded:
        parts += _details(f"Explored, not decided: {_tally(folded)}", _rows(folded))
    parts.append(_reading(paper, name))
    for other in others:
        summary = f"The same by profile {other['profile']}"
        parts += _details(summary, f"{_links(paper, name, other['profile'])}\n\n{_rows(other['claims'])}")
    return parts


def _links(paper: str, name: str, profile: str) -> str:
    places = {
        "notebook": f"../notebooks/{paper}/{name}.ipynb",
        "executed": f"{profile}/executed/{paper}/{name}.ipynb",
        "numbers": f"{profile}/{paper}/{name}.json",
    }
    return " · ".join([f"Profile `{profile}`", *(f"[{word}]({place})" for word, place in places.items())])


def _details(summary: str, content: str) -> list[str]:
    return [f"<details>\n<summary>{summary}</summary>", content, "</details>"]  # markdown inside wants blank lines


def _rows(decided: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for claim in decided:
        statement = _cell(claim["statement"])
        statement = f"**{statement}**" if claim["role"] == "main" else statement
        rows.append([f"{statement}<br><sub>{_cell(claim['rule'])}</sub>", *_outcome(claim), claim["role"]])
    return _table(["claim", "ours", "verdict", "role"], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _once(found: Mapping[str, list[dict[str, Any]]], role: str) -> list[dict[str, Any]]:
    """The claims of a role, each by the first profile that has it, with the exhibit that it stands in."""
    first = [drawings[0] for drawings in found.values()]
    return [c | {"exhibit": one["exhibit"]} for one in first for c in one["claims"] if c["role"] == role]


def _counts(decided: Iterable[Mapping[str, Any]]) -> list[str]:
    number = Counter(claim["verdict"] for claim in decided)
    return [str(number[word] or "–") for word in VERDICTS]


def _tally(decided: Iterable[Mapping[str, Any]]) -> str:
    """`3 inconclusive, 1 disagrees`."""
    return ", ".join(f"{n} {word}" for n, word in zip(_counts(decided), VERDICTS, strict=True) if n != "–") or "–"


def _outcome(claim: Mapping[str, Any]) -> list[str]:
    """The columns `ours` and `verdict`: both sides where a difference was taken, the estimate, its interval."""
    if claim["ours"] is None:
        return ["–", claim["verdict"]]
    sides, text = claim.get("sides"), _number(claim["ours"])
    if sides:
        sign = "+" if claim["ours"] > 0 and not claim["ordered"] else ""
        joint, equals = (" → ", "; τ = ") if claim["ordered"] else (" − ", " = ")
        text = f"{joint.join(_number(side, 4) for side in sides)}{equals}{sign}{text}"
    if claim["interval"] is not None:
        text += " [{}, {}]".format(*map(_number, claim["interval"]))
    return [text, claim["verdict"]]


def _number(value: int | float, digits: int = 3) -> str:
    kind = ".0f" if abs(value) >= 1000 else ".5f" if 1e-5 <= abs(value) < 1e-4 else f".{digits}g"
    return f"{value:{kind}}".replace("-", "−")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sources(paper: str, exhibit: str) -> list[str]:
    """The cells of an exhibit's notebook, as text."""
    cells = paths.read_json(paths.NOTEBOOKS / paper / f"{exhibit}.ipynb")["cells"]
    return ["".join(cell["source"]) for cell in cells]


def _title(paper: str, exhibit: str) -> str:
    """What an exhibit shows, by the first line of its notebook: `# KDRL: beside SFT` is `beside SFT`."""
    line = _sources(paper, exhibit)[0].splitlines()[0].removeprefix("# ")
    return _cell(line.removeprefix(f"{PAPERS[paper]}: "))


def _place(paper: str, exhibit: str) -> str:
    return f"[{PAPERS[paper]}, {_title(paper, exhibit)}](results/{paper}.md#{exhibit})"


def _reading(paper: str, exhibit: str) -> str:
    [text] = [text for text in _sources(paper, exhibit) if text.startswith("**Reading.**")]
    return " ".join(text.split())


if __name__ == "__main__":
    write()
