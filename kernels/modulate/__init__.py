"""LayerNorm with per-frame scale and shift, and the gated residual before it. The public calls are in `api`."""
