"""Generation, the three-way judge, and the utility measures that stand beside harm."""
