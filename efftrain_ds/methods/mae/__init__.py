"""Masked autoencoder pre-training."""
