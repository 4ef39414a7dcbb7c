"""Which model to ask next, or whose answer to take: routing, cascades, and both in one."""
