"""Triton and C kernels, one sub-package a family. Imports nothing: each kernel is loaded by the code that runs it."""
