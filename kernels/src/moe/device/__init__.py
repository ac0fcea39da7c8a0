"""The kernels themselves. Importing a module here imports triton; nothing above does before a kernel is launched."""
