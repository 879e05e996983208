"""Virtual time and virtual links: the real protocol code, thousands of peers, one process."""
