"""The comparison of backup schemes: the same disk, guest and target for each, and what the guest had of it."""
