"""Folders, images and the toy set. A real package, so that no other `data` on the path wins."""
