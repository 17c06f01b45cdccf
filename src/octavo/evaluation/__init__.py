"""How well and at what cost a model answers questions about long documents: synthetic tasks, and the ways of asking."""
