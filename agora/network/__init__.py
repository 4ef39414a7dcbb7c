"""Several ways to the same help: which links there are, what they are like now, and which one to take."""
