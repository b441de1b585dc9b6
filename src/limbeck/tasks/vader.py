"""VADER's rated sentences: film reviews and tweets, and whether people found them positive or negative.

Each line is an id, the mean of about 20 people's ratings from -4 to 4, and a text (Hutto and Gilbert, ICWSM 2014). The
ids do not tell which review a sentence is from, so sentences of one review may lie in different splits, which makes
the films' test easier than a test on other reviews. The tweets are tweet-like: 4,000 after real ones, 200 contrived.
"""

from limbeck import assets

FILES = {"vader_movie": "movie.txt", "vader_tweets": "tweets.txt"}
_CLEAR = 0.5  # the smallest |mean rating| that counts as an opinion; ours


def pairs(name: str) -> list[tuple[str, str]]:
    """Every (text, sign of its mean rating), duplicates included; a mean nearer to neutral than 0.5 is dropped."""
    lines = (assets.path("vader") / FILES[name]).read_text(encoding="utf-8").strip().split("\n")
    rated = [(text, float(mean)) for _, mean, text in (line.split("\t") for line in lines)]
    return [(text, "positive" if mean > 0 else "negative") for text, mean in rated if abs(mean) >= _CLEAR]
