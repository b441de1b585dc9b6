"""Text, CamRest676, the second data set (`text`)."""

from limbeck.experiments.nola.text import Params, cells, run

__all__ = ["Params", "cells", "run"]
