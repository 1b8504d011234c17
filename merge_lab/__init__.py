"""Learn how to merge language models: frozen weights blended by trained coefficients."""

__version__ = "0.1.0"
