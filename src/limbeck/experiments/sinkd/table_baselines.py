"""SinKD beside other ways to distil: divergences, relations, decoupled and patient KD, an assistant (`comparison`)."""

from limbeck.experiments.sinkd.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
