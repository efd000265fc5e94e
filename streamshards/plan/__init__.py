"""Decisions, pure: no I/O, threads, clock or torch.distributed. Same arguments, same answer, for ever."""
