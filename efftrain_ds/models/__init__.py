"""Adapters over timm."""
