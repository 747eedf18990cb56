"""virtio-vhost-user: the PCI function (device side) and its driver, which turns it into a vhost-user transport.

`layout` has the numbers; `function`, `proxy`, `shared_memory_bar`, `notifications` and `kick_relay` are the device,
`driver` and `driver_transport` drive it. docs/vvu.md is the specification.
"""
