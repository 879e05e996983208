"""A checkpoint: config, weights, blocks, KV cache, edges, tokenizer and chat template. Knows no network."""
