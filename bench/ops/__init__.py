"""One file an op: its sizes by name, its competitors, and the bytes and FLOPs that it must move and do."""
