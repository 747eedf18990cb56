"""The vhost-user protocol, both ends (QEMU docs/interop/vhost-user.rst).

`messages` is what crosses the wire, `socket_transport` moves it, `backend` answers it, `frontend` asks. The back-end
takes everything from a `transport.Connection`, so that it serves a UNIX socket and a VVU function alike.
"""
