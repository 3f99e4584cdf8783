"""What leans on the insides of other libraries, one file a library: the files say what, for whom,
and at which versions it was tested (pyproject's bounds); no other file names such insides."""
