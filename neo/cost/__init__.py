"""What operations cost: hardware and model presets, the cost models, and the memory left for KV."""
