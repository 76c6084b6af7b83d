"""Triton kernels, one file per operator; nothing here is imported before a kernel is needed."""
