"""Models: pretrained, drawn or cut out of others, by architecture; and the machine that they compute on."""

from limbeck.models.machine import autocast, device, precision, trainable

__all__ = ["autocast", "device", "precision", "trainable"]
