"""virtio-blk: the image, the configuration space, the device, and its part of a worker."""
