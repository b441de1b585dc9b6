"""SinKD on encoders: cross-entropy, with KL, and with KL and the Sinkhorn distance, over five tasks (`comparison`)."""

from limbeck.experiments.sinkd.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
