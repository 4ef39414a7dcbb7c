"""Learning together: asynchronous, clustered and hierarchical federated fine-tuning of adapters.

(Another distribution, RayFed, has the same import name; do not install both.)
"""
