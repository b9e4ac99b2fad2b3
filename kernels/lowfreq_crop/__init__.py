"""Low-frequency crop (EfficientTrain) and antialiased resampling by matrix products."""

from .check import self_test
from .matrices import crop_matrix, resample_matrix
from .op import lowfreq_crop, resample

__all__ = ["crop_matrix", "lowfreq_crop", "resample", "resample_matrix", "self_test"]
