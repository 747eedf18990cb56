"""A PCI function carried by QEMU's ivshmem-doorbell device: registers and queues in shared memory (docs/ivshmem.md)."""
