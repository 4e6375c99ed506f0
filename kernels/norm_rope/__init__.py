"""RMSNorm of queries or keys, rotary and block means in one pass. The public calls are in `api`."""
