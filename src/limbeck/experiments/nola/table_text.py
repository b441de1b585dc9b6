"""Text, MultiWOZ, adapters in the top layers (`text`)."""

from limbeck.experiments.nola.text import Params, cells, run

__all__ = ["Params", "cells", "run"]
