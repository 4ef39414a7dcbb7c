"""What the gateway benchmark is made of: the upstream, the load, the servers compared, and how they are measured."""
