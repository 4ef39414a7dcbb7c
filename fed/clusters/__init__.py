"""Clients that need different models get different models, and which is which is found out while they train.

Clients are grouped by what their updates change (`agglomerative`), by which model fits their data best (`ifca`), or by
how long a job takes them (`profile`); see `fed.clusters.ways`.
"""
