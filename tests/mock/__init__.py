"""Stand-ins for the other side, in plain Python, written against the specifications and not against vvupipe."""
