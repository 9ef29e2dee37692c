"""Measuring machines: throughput of h, its peers, how a timing is taken."""
