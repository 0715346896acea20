"""torchchat: chat with, quantise, measure and export large language models with PyTorch."""

__version__ = "0.1.0"
