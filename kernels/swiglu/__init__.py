"""silu(a) * b. The public calls are in `api`."""
