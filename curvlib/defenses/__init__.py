"""Ways to keep or regain safety, each from its paper's equations, behind one interface: one file a method.

To add one: write its file, put one line into :mod:`curvlib.defenses.registry`, and test it on a case worked by hand.
"""
