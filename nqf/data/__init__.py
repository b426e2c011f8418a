"""Tables: schema, readers, canonical items and interactions, splits, and the built-in catalogue."""
