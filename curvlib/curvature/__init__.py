"""Curvature operators, their spectra and solvers."""
