"""Virtual machines: the embedded ones and QEMU."""
