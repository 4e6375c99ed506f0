"""Block-sparse attention over a grid of video tokens. The public call is `api.block_sparse_attention`."""
