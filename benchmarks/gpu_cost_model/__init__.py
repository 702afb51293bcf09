"""Estimates of the GPU kernels' times from their compiled binaries and the GPUs' figures. Nothing here is measured."""
