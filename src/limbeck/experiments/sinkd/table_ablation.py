"""SinKD's terms taken away one by one, with controls for each, on two students (`comparison`)."""

from limbeck.experiments.sinkd.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
