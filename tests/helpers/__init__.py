"""What several test modules share: ranks of a process group, collectives of one process, small configurations."""
