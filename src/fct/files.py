"""The name that :mod:`fct.atomic_files` had in version 0.1, for scripts that import it."""

from fct.atomic_files import atomic_path, checksum_bytes, checksum_file, refuse_existing, write_bytes, write_text

__all__ = ["atomic_path", "checksum_bytes", "checksum_file", "refuse_existing", "write_bytes", "write_text"]
