"""Packaging of EffTrain-DS.

The top-level folder ``kernels/`` is installed as ``efftrain_ds.kernels``: PyPI already has a package
whose import name is ``kernels``, so ours must not be importable under that name.
"""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["efftrain_ds", "efftrain_ds.*"])
KERNELS = ["efftrain_ds.kernels"] + ["efftrain_ds.kernels." + name for name in find_packages("kernels")]

setup(
    packages=PACKAGES + KERNELS,
    package_dir={"efftrain_ds": "efftrain_ds", "efftrain_ds.kernels": "kernels"},
)
