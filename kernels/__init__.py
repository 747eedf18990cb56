"""The data plane: numba kernels on virtqueues, guest memory and files. Imports nothing of `vvupipe`.

`virtio_layout` and `control_block` are plain numbers and dtypes, which the control plane imports too; every other
module needs numba. `jit` holds the one compilation policy, `memory` the only code that touches a raw address.
"""
