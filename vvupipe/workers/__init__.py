"""Worker processes: what runs kernels, and how the coordinator commands it."""
