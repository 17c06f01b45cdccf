"""Files of a folder as documents, cut into passages, kept in an index, and found again."""
