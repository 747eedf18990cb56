"""What a device must do, in plain Python, written against the specifications and not against the kernels."""
