"""The course kit: exercises that tell a likely mistake in one line, their release to students, and grading.

Importing it loads torch and the standard library only, so that a student's notebook starts in seconds.
"""

from curvlib.exercises.core import assess, check, load, score

__all__ = ["assess", "check", "load", "score"]
