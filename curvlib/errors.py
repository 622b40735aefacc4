"""The one error that a user can cause."""


class CurvlibError(Exception):
    """Say in one line what was given, what was expected, and what to do."""
