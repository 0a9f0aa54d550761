"""The `slimtune` command and the Python client that it is built on."""
