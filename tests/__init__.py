"""A package of its own, so that no ``tests`` that another distribution installs (kronfluence does) shadows this one."""
