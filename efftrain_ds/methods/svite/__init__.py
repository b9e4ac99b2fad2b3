"""SViTE: sparse training of vision transformers at a fixed budget."""

from .config import SViTEConfig
from .method import SViTE

__all__ = ["SViTE", "SViTEConfig"]
