"""Device back-ends. Each gives the vhost-user back-end a `Device` and its workers a `DeviceKernel`."""
