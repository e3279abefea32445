"""Which implementations the tests run on."""

import os

# For machines without a compiler: TF_CENTER_LOSS_TEST_GRAPH_ONLY=1 deselects the native cases.
# Otherwise a native case that cannot run fails; it never skips.
GRAPH_ONLY = os.environ.get("TF_CENTER_LOSS_TEST_GRAPH_ONLY") == "1"
IMPLEMENTATIONS = ["graph"] if GRAPH_ONLY else ["native", "graph"]
