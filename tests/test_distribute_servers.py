"""Under ParameterServerStrategy the op runs on the table's server, or as a graph on its parts."""

from replicas import Cluster


def test_the_op_runs_on_the_server_of_the_table(native_library, tmp_path):
    with Cluster("serve_one_table", tmp_path, ps=1, worker=1, chief=1) as cluster:
        cluster.finish("chief")


def test_a_graph_runs_on_a_partitioned_table(tmp_path):
    with Cluster("serve_a_partitioned_table", tmp_path, ps=2, worker=1, chief=1) as cluster:
        cluster.finish("chief")
