"""Bytes between peers: identity, addresses, handshake, records, frames, streams, RPC. Knows no tensor."""
