"""Kernels: one folder an operation, each with a plain torch reference. Imports torch and triton only."""
