"""Using blocks: sessions over a chain, recovery, generation."""
