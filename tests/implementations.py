"""Which implementations the tests run on."""

import os

# Where there is no compiler: TF_CENTER_LOSS_TEST_GRAPH_ONLY=1 leaves the native cases out (they are
# counted as deselected). Without it a native case that cannot run fails: it never skips.
GRAPH_ONLY = os.environ.get("TF_CENTER_LOSS_TEST_GRAPH_ONLY") == "1"
IMPLEMENTATIONS = ["graph"] if GRAPH_ONLY else ["native", "graph"]
