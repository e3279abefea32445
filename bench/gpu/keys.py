"""Keys of implementations that the report uses; the report runs without PyTorch."""

KERNEL, ATOMIC, EMPTY, COPY = "kernel graph", "atomic graph", "empty launch", "copy"
COMPILED = ("compiled table", "compiled pairs")
TUTORIAL_OPS, FUSED_OP = "tutorial busy", "fused busy"  # steps in TensorFlow
OWN = (f", {KERNEL}", ", kernel", f", {ATOMIC}")  # ends of the names of this package's kernels
