"""Kademlia: ids, routing table, signed records, storage, lookup, node. Knows no tensor and no model."""
