"""Serving blocks: sessions, the compute thread, announcing."""
