"""Where ranks go: a snapshot of the cluster, a pure planner, and Ray placement groups."""
