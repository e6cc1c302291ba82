"""The NBD server: handshake in Python, transmission without the interpreter. Start at server.py."""
