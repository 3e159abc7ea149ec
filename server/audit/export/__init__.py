"""Ships entries and checkpoints to other hosts, in order, without loss; one sink a file."""
