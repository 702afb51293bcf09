"""What a call of a GPU layer costs the host, measured without a GPU: the bound layer beside Triton's own launches."""
