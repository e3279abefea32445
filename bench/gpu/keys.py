"""Names of implementations that the report knows; it runs without PyTorch."""

KERNEL, ATOMIC, EMPTY = "kernel graph", "atomic graph", "empty launch"
COMPILED = ("compiled table", "compiled pairs")
OWN = (f", {KERNEL}", ", kernel", f", {ATOMIC}")  # how the names of what we answer for end
