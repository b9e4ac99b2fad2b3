"""EfficientTrain and EfficientTrain++: curriculum over spatial frequency and augmentation strength."""

from .config import EfficientTrainConfig, StageConfig
from .method import EfficientTrain

__all__ = ["EfficientTrain", "EfficientTrainConfig", "StageConfig"]
