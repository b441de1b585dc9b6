"""Text, MultiWOZ, adapters in more layers, with every row (`text`)."""

from limbeck.experiments.nola.text import Params, cells, run

__all__ = ["Params", "cells", "run"]
