"""vvupipe: virtio-vhost-user for stock hypervisors.

Control plane only; the data plane is the `kernels` package. docs/architecture.md shows how the parts fit.
"""

__version__ = "0.1.0"
