"""Where rows live: readers and writers for files, object stores, Lance and FAISS, and the interface for your own."""

from fct.gallery.array_argument import load_labels, load_vectors, split_column
from fct.gallery.beside_rows import load_ids
from fct.gallery.bulk import export_bulk
from fct.gallery.interfaces import VECTOR_KEY, Batches, Destination, Output, Piece, Shard, Source
from fct.gallery.location import Location, location_of
from fct.gallery.named_pairs import load_pairs
from fct.gallery.space_tags import tag_space
from fct.gallery.stores import FORMATS, journal_location, lance_in, open_destination, open_source
from fct.gallery.vectors import VECTOR_FORMATS, vector_array, vector_block

__all__ = [
    "FORMATS",
    "VECTOR_FORMATS",
    "VECTOR_KEY",
    "Batches",
    "Destination",
    "Location",
    "Output",
    "Piece",
    "Shard",
    "Source",
    "export_bulk",
    "journal_location",
    "lance_in",
    "load_ids",
    "load_labels",
    "load_pairs",
    "load_vectors",
    "location_of",
    "open_destination",
    "open_source",
    "split_column",
    "tag_space",
    "vector_array",
    "vector_block",
]
