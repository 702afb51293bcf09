"""Estimates of the GPU kernels' times from compiled binaries and the GPUs' published figures. Nothing is measured."""
