"""How a server makes the next version of an adapter out of its clients' updates: one rule a file, all of one protocol.

`fed.aggregate.rules` has the registry. A rule is told of updates one by one (`absorb`) and asked for the next version
when the server thinks it is time (`publish`); between the two it holds as little as the method allows.
"""
