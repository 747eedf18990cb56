"""virtio for control queues, in plain Python: split rings and the register block of virtio-pci."""
