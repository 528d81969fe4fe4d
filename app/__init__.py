"""What people touch: the Serve application, its configuration, the HTTP API and the client."""
