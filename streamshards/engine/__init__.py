"""The engine: the only threads. Fetch, verify, decode, shuffle and hand out batches, in order and bounded in bytes."""
