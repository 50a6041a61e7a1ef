"""Backends: the choice among the rows of :mod:`nsa.registry`, and one folder for each."""

from nsa.backends.dispatch import Resolution, load, resolve, unavailable
from nsa.registry import TABLE

__all__ = ["TABLE", "Resolution", "load", "resolve", "unavailable"]
