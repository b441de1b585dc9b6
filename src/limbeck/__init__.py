"""Small, cheap and good language models: SinKD, NOLA and KDRL, each from its paper.

`limbeck.losses` and `limbeck.adapters` are pure torch; the rest makes the experiments reproducible.
"""

from importlib.metadata import version

__version__ = version("limbeck")
