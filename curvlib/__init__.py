"""Curvature of fine-tuned language models: the helper module behind the notebooks."""

__version__ = "0.1.0"
