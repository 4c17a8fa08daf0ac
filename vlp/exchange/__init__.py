"""Weights of other libraries, in and out: one file per library, one table of tensors for both directions.

Needs none of the libraries themselves; where one is installed, `compare` runs both models on the same inputs.
"""
