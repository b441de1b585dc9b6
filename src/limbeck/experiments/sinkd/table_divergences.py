"""SinKD's comparison of divergences: one added term at a time, beside cross-entropy alone or with KL (`comparison`)."""

from limbeck.experiments.sinkd.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
