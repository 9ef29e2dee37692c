"""Developers' tools: models of GPUs and what reads machine code. Not in the wheel."""
