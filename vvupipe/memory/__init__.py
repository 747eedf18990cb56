"""Memory that processes share: regions, mappings, POSIX shared memory, doorbells."""
