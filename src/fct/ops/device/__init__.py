"""What a device can do, and streaming rows through one."""
