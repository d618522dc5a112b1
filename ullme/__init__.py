"""ULLME: any decoder-only language model as a text embedder (Man et al. 2024, arXiv 2408.03402)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ullme")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"
