"""slim_core: exact training of causal linear-attention models in memory that does not grow with the sequence.

Source: Likhosherstov, Choromanski, Davis, Song, Weller, "Sub-Linear Memory: How to Make Performers SLiM", NeurIPS 2021.
Importing this package imports no torch; `slim_core.model` and everything that holds tensors does.
"""
