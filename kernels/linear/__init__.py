"""Products with int8 and fp8 weights. The public calls are in `api`."""
