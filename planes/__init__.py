"""How Headrace's processes talk: control (etcd), events (NATS), data (TCP streams, NIXL)."""
