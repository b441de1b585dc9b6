"""`table_vision` at more shots, on another data set, and on a convolutional network with ImageNet weights."""

from limbeck.experiments.nola.few_shot import cells, run
from limbeck.experiments.nola.vision_section import Section as Params

__all__ = ["Params", "cells", "run"]
