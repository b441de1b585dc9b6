"""KDRL's parts one by one, and other students and teachers (`comparison`): six exhibits read these runs."""

from limbeck.experiments.kdrl.comparison import Params, cells, run

__all__ = ["Params", "cells", "run"]
