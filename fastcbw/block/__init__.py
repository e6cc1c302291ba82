"""Block devices: the one data-plane interface and its leaves."""
