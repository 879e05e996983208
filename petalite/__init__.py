"""petalite: run and fine-tune large language models together over the Internet."""

__version__ = "0.1.0"
