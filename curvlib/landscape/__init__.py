"""The loss around a model in effective-weight space: directions, slices, and how two windows compare."""
