"""The version, for whoever must name it without importing the package's face."""

__version__ = "0.1.0"
