"""From a page or photograph to ordered lines of text, and from readings to files."""
