"""EvoPress: the best assignment of compression levels under a budget (arXiv 2410.14649)."""
