"""VFIO: the interface of a function as a user-space driver sees it, and vfio-user, which carries it over a socket."""
