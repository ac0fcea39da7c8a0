"""Start a real Ray cluster of two workers on this machine, print its address, end it when standard input closes."""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
