"""What servers and clients agree on: model ids, server records, tensor messages, routing."""
