"""What runs on the cluster: manager, coordinator and engine cores, and the pure protocols they follow."""
