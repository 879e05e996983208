"""petalite's version: what packaging, the handshake's agent and servers' records say."""

__version__ = "0.1.0"
