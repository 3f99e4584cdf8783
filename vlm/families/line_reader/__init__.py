"""Line readers: image tokens along a line, a character each (CTC)."""
