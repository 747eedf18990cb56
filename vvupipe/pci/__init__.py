"""PCI as a function and a bus show it: addresses, configuration space, MSI-X, the sysfs-shaped tree."""
