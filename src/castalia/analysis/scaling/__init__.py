"""Scaling laws: loss = E + A/N^alpha + B/D^beta fitted to the runs of a suite."""

from castalia.analysis.scaling.fit import ScalingFit, fit_scaling
from castalia.analysis.scaling.points import Point, Points
from castalia.analysis.scaling.read import read_points

__all__ = ["Point", "Points", "ScalingFit", "fit_scaling", "read_points"]
