"""What the format's decisions cost and buy, measured on single layers."""
